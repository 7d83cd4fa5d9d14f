"""README's tables: what they say follows from the CSVs, and only from them."""

import csv
import subprocess
import sys

import pytest

from benchmarks import readme

GEMM = {"device": "a GPU", "jax": "0.11.2", "clock": "wall", "torch_bf16": "500"}
GEMM |= {"m": "4096", "n": "256", "k": "128", "cublaslt_per_tensor_fast": "1500"}
LAYER = {"tokens": "512", "in": "256", "out": "128", "tflops": "9"}


def of(base, **columns):
    return base | columns


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Results of every benchmark, small."""
    fast = of(GEMM, gemm="1d2d", fp8jax="1200", cublaslt_blockwise="1000", ratio="1.2")
    slow = of(fast, fp8jax="300", cublaslt_blockwise="1000", ratio="0.3")
    few = of(fast, m="1", cublaslt_blockwise="", ratio="", fp8jax="3")
    wgrad = of(slow, gemm="1d1d", m="128", ratio="0.5", fp8jax="500")
    write(tmp_path / "gemm.csv", [fast, slow, few, wgrad])
    times = {"wall_us": "200.0", "kernel_us": "190.0"}
    base = of(LAYER, contender="jax bf16", wall_speedup="1", kernel_speedup="1")
    fp8 = of(
        LAYER,
        contender="fp8jax deepseek_v3",
        wall_us="125.0",
        kernel_us="100.0",
        wall_speedup="1.6",
        kernel_speedup="1.9",
    )
    write(tmp_path / "layer.csv", [of(base, **times), fp8])
    decode = {"m": "16", "n": "7168", "k": "16384", "us": "30.0", "tflops": "125"}
    decode |= {"weight_gbps": "3900", "copy_gbps": "4300", "of_copy": "0.907"}
    write(tmp_path / "decode.csv", [of(decode, ratio=""), of(decode, m="1", ratio="2")])
    losses = {"train_loss": "2.0", "heldout_loss": "3.0", "tokens_per_second": "10"}
    for program, held_out in (("train_lm", "3.0"), ("train_moe", "1.5")):
        arms = [of(losses, arm="bf16"), of(losses, arm="fp8", heldout_loss=held_out)]
        (tmp_path / f"{program}_h200").mkdir()
        write(tmp_path / f"{program}_h200" / "summary.csv", arms)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.usefixtures("results")
def test_summary_has_a_line_for_each_target_with_its_ceiling():
    text = "\n".join(readme.summary())
    for line in (
        # sqrt(1200 * 300) and sqrt(1.2 * 0.3)
        "2 shapes with m >= 4096, TFLOPS | 600 | 1000 cuBLASLt blockwise | "
        "0.60 (0.30 to 1.20) | 1500 per tensor, 1979 peak |",
        "(wgrad), 1 shapes, TFLOPS | 500 | 1000 cuBLASLt blockwise | 0.50",
        "Layer 256 to 128, 512 tokens, deepseek_v3: fprop, dgrad, wgrad, us | 125 | "
        "200 BF16 | 1.60 | 2.00 |",
        "m=16, n=7168, k=16384, GB/s of the weight | 3900 | 4300 a copy | 0.91 | 4800",
        "| train_lm | fp8 | 2.0000 | 3.0000 | +0.00% and +0.00% | 10 |",
        "| train_moe | fp8 | 2.0000 | 1.5000 | +0.00% and -50.00% | 10 |",
    ):
        assert line in text, text
    assert "gemm_by_m.png" not in text


def test_the_plot_is_linked_once_it_is_there(results):
    (results / "gemm_by_m.png").touch()
    assert "(benchmarks/results/gemm_by_m.png)" in "\n".join(readme.summary())


def test_a_transformed_step_has_its_roles_and_shares(results):
    roles = {"fprop": "4", "recompute": "3", "dgrad": "4", "wgrad": "4"}
    row = {"framework": "plain", "products": "26", **roles, "head": "3"}
    row |= {"attention": "8", "fraction": "0.9231", "device": "cpu", "jax": "0.10.2"}
    row |= {"analysis_ms": "240", "analysis_share": "0.0260", "wrapped_us": "4000"}
    write(results / "transform.csv", [row | {"dispatch_ratio": "1.049"}])
    assert (
        "| plain | 26 | 4 fprop, 3 recompute, 4 dgrad, 4 wgrad | 8 attention, 3 head | "
        "92.3% | 240 | 2.6% | 4000 | 1.05 |"
    ) in "\n".join(readme.every_row())


GROUPED = {"m": "512", "n": "256", "k": "128", "clock": "wall", "dense": "1000"}
GROUPED |= {
    "device": "another GPU",
    "lax_bf16": "50",
    "pallas_bf16": "400",
    "dense_bf16": "700",
    "fp8jax_kernel": "950",
    "dense_kernel": "1050",
}


def test_grouped_gemms_stand_beside_the_dense_kernel(results):
    even = of(GROUPED, gemm="1d2d", groups="4", sizes="128 each", fp8jax="900")
    even |= {"of_dense": "0.9", "over_bf16": "2.25"}
    uneven = of(even, groups="2", sizes="511 1", fp8jax="400", of_dense="0.4")
    uneven |= {"pallas_bf16": "", "lax_bf16": "", "over_bf16": ""}
    write(results / "grouped.csv", [even, uneven])
    # sqrt(900 * 400) and sqrt(0.9 * 0.4)
    assert "On one a GPU (groups, mixtures, decoding: another GPU), JAX" in " ".join(
        readme.summary()
    )
    assert (
        "| Grouped GEMM, 1x128 by 128x128, 2 shapes, TFLOPS | 600 | "
        "1000 our dense kernel | 0.60 (0.40 to 0.90) | 1979 peak |"
    ) in "\n".join(readme.summary())
    text = "\n".join(readme.every_row())
    for line in (
        "| 1d2d 4 x 128 each; 512, 256, 128 | 900 | 1000 | 0.90 | 950 | 1050 | 50 | "
        "400 | 700 | 2.25 | wall |",
        "| 1d2d 2 x uneven; 512, 256, 128 | 400 | 1000 | 0.40 | 950 | 1050 |  |  | "
        "700 |  | wall |",
    ):
        assert line in text, text


def test_a_mixture_is_compared_with_the_fastest_in_bf16(results):
    sizes = dict.fromkeys(("tokens", "features", "hidden", "experts", "top_k"), "8")
    times = {"kernel_us": "90.0", "tflops": "7", "over_lax": "2", "over_pallas": ""}
    times |= {"device": "a GPU", "over_dense": "0.5"}
    base = of(sizes | times, contender="jax bf16", wall_us="400.0")
    pallas = of(base, contender="pallas bf16", wall_us="300.0", over_pallas="1")
    dense = of(base, contender="dense bf16", wall_us="100.0")
    fp8 = of(base, contender="fp8jax deepseek_v3", wall_us="200.0", over_pallas="1.5")
    smaller = [of(r, tokens="4") for r in (base, fp8)]
    write(results / "moe.csv", [base, pallas, dense, fp8, *smaller])
    summary = "\n".join(readme.summary())
    assert (
        "| Mixture of 8 experts, 8 by 8, 8 tokens, top 8, deepseek_v3: a whole step, "
        "us | 200 | 300 pallas bf16 | 1.50 | 2.00 |"
    ) in summary
    assert summary.count("Mixture") == 1
    text = "\n".join(readme.every_row())
    row = (
        "| 8, 8, 8, 8, 8 | fp8jax deepseek_v3 | 200.0 | 90.0 | 7 | 2.00 | 1.50 | 0.50 |"
    )
    assert row in text
    assert "| 4, 8, 8, 8, 8 | jax bf16 | 400.0 | 90.0 | 7 | 2.00 |  | 0.50 |" in text


def test_decoding_is_compared_with_bf16(results):
    times = {"wall_us": "110.0", "queued_us": "100.0", "kernel_us": "90.0"}
    speeds = {f"{time}_speedup": "1.000" for time in ("wall", "queued", "kernel")}
    base = of(times | speeds, m="16", contender="jax bf16", device="a GPU")
    slow = of(base, contender="fp8 layers", queued_us="80.0", queued_speedup="1.250")
    fast = of(slow, contender="fp8 fused", queued_us="50.0", queued_speedup="2.000")
    write(results / "inference.csv", [base, slow, fast, of(base, m="1")])
    assert (
        "| Decode 16 tokens, a 7B layer, fp8 fused, us | 50 | 100 BF16 | 2.00 | 2.00 |"
    ) in "\n".join(readme.summary())
    text = "\n".join(readme.every_row())
    assert "| 16 | fp8 layers | 80.0 | 110.0 | 90.0 | 1.25 | 1.00 | 1.00 |" in text
    assert "| 1 | jax bf16 | 100.0 | 110.0 | 90.0 | 1.00 | 1.00 | 1.00 |" in text


@pytest.mark.usefixtures("results")
def test_every_row_is_there_and_a_missing_contender_is_an_empty_cell():
    text = "\n".join(readme.every_row())
    for line in (
        "| 1d2d 1, 256, 128 | 3 |  |  | 1500 | 500 | wall |",
        "| 512, 256, 128 | fp8jax deepseek_v3 | 125.0 | 9 | 1.60 | 1.90 |",
        "| 16, 7168, 16384 | 30.0 | 125 | 3900 | 4300 | 0.91 |  |",
        "| 1, 7168, 16384 | 30.0 | 125 | 3900 | 4300 | 0.91 | 2.00 |",
    ):
        assert line in text, text


def test_tables_without_results_are_left_out(results):
    (results / "decode.csv").unlink()
    (results / "layer.csv").unlink()
    text = "\n".join((*readme.summary(), *readme.every_row()))
    assert not any(word in text for word in ("Layer", "Grouped", "Mixture"))
    assert "16384" not in text.replace("[16384, 7168]", "")


def test_check_names_the_file_that_differs(results):
    command = [sys.executable, "-c", PROGRAM, str(results)]
    root = readme.HERE.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "README.md differs from the results: run python -m benchmarks" in run.stderr


PROGRAM = """
import pathlib, sys
from benchmarks import readme
readme.RESULTS = pathlib.Path(sys.argv[1])
sys.argv[1:] = ["--check"]
readme.main()
"""


@pytest.mark.usefixtures("results")
def test_products_of_models_have_a_line_for_each_half(results):
    base = {"device": "a GPU", "m": "4096", "n": "256", "k": "128"}
    ratios = {"tune": ("0.9", "1.3"), "report": ("1.0", "1.1", "1.4")}
    rows = [
        of(base, half=half, fp8jax="1000", ratio=ratio)
        for half, found in ratios.items()
        for ratio in found
    ]
    write(results / "gemm_models.csv", rows)
    text = "\n".join(readme.every_row())
    assert "of their own half) | 2 | 1000 | 1.10 | 0.90 to 1.30 | 1 |" in text
    assert "seen them) | 3 | 1000 | 1.10 | 1.00 to 1.40 | 0 |" in text


@pytest.mark.usefixtures("results")
def test_narrow_blocks_have_a_line_each(results):
    row = {"tokens": "16384", "width": "768", "layers": "4", "bf16_us": "100"}
    row |= {"fp8_us": "80", "speed": "1.25", "device": "a GPU"}
    rows = [of(row, square_in_bf16=kept) for kept in "01"]
    write(results / "narrow.csv", rows)
    text = "\n".join(readme.every_row())
    assert "| 16384 | 768 | all | 100 | 80 | 1.25 |" in text
    assert "| 16384 | 768 | the MLP | 100 | 80 | 1.25 |" in text


@pytest.mark.usefixtures("results")
def test_batches_of_experts_have_a_line_each(results):
    row = {"entries": "8", "width": "4096", "hidden": "14336", "form": "weight first"}
    row |= {"bf16_us": "100", "fp8_us": "80", "speed": "1.25", "device": "a GPU"}
    write(results / "batched.csv", [of(row, rows=rows) for rows in ("128", "256")])
    text = "\n".join(readme.every_row())
    assert "| 8 | 4096, 14336 | 128 | weight first | 100 | 80 | 1.25 |" in text
    assert "| 8 | 4096, 14336 | 256 | weight first | 100 | 80 | 1.25 |" in text
