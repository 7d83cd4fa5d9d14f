"""The benchmarks' own logic, on a CPU: tables, options, CSVs and HLO lists."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from benchmarks import (
    _harness,
    _hlo,
    _models,
    activations,
    batched,
    decode,
    gemm,
    gemm_models,
    inference,
    layer,
    narrow,
    plot_m,
    quantize,
    sanitize,
    transform,
)
from fp8jax.kernels import mosaic_gpu, xla
from tests.benchmarks.running import rows, run


def test_transform(on_cpu, monkeypatch):
    monkeypatch.setattr(transform, "ANALYSES", 1)
    # What XLA takes its time for: to compile the step, and to compile and run two.
    monkeypatch.setattr(transform, "_compile", transform._analyze)
    times = {"plain": 100.0, "wrapped": 105.0}
    monkeypatch.setattr(_harness, "alternate", lambda contenders, **_: times)
    cases = {"plain": transform.CASES["plain"]}
    monkeypatch.setattr(transform, "CASES", cases)
    with jax.numpy_dtype_promotion("standard"):
        run(monkeypatch, transform, "--commit abc")
    (row,) = rows(on_cpu / "transform.csv")
    assert (row["framework"], row["products"], row["fprop"]) == ("plain", "26", "4")
    assert float(row["fraction"]) > 0.9
    assert row["dispatch_ratio"] == "1.050"
    assert row["commit"] == "abc"


def test_activations(on_cpu, monkeypatch):
    for name, size in (("FEATURES", 128), ("HIDDEN", 256), ("HEADS", 2)):
        monkeypatch.setattr(activations, name, size)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norm and attention promote.
        run(monkeypatch, activations, "--commit abc")
    kept = {
        (row["part"], row["recipe"], row["checkpoint"]): int(row["bytes_a_token"])
        for row in rows(on_cpu / "activations.csv")
    }
    inputs, fp8 = "inputs of q, k, v and o", 'residual="fp8"'
    assert kept[inputs, activations.BASE, ""] == 4 * 2 * 128
    assert kept[inputs, fp8, ""] == 4 * (128 + 4) <= 0.55 * 4 * 2 * 128
    assert kept["SwiGLU", 'residual="recompute"', ""] == 2 * 128
    assert kept["block", fp8, ""] < kept["block", 'residual="bf16"', ""]
    assert kept["block", fp8, "none"] == 2 * 128  # Its own input.


def test_gemm(on_cpu, monkeypatch):
    shapes = {"1d2d": [(8, 128, 128)], "1d1d": [(8, 128, 256)]}
    shapes["2d1d"] = [(128, 8, 384)]
    monkeypatch.setattr(gemm, "SHAPES", shapes)
    run(monkeypatch, gemm, "--rounds 1 --commit abc")
    one, two, three = rows(on_cpu / "gemm.csv")
    assert (one["gemm"], two["k"], three["commit"]) == ("1d2d", "256", "abc")
    assert one["ratio"] == one["cublaslt_blockwise"] == ""


def test_kernels_of_contenders_take_turns_of_equal_length(monkeypatch):
    turns = []
    us = {"slow": 50.0, "fast": 10.0}

    def turn(name, launches):
        turns.append((name, launches))
        return us[name] * (100 if len(turns) < 5 else 1)  # The first ones are cold.

    monkeypatch.setattr(_harness, "_kernel_turn", lambda f, count: turn(f(), count))
    contenders = {name: lambda name=name: name for name in us}
    monkeypatch.setattr(_harness, "_wait", lambda out: None)
    found = _harness.alternate_kernels(contenders, turn_us=50_000.0, rounds=2)
    assert found == us
    # Ten cold launches fill a turn of the slow one, fifty of the fast one.
    assert turns == [("slow", 3), ("fast", 3), *[("slow", 10), ("fast", 50)] * 3]


@pytest.fixture
def two_contenders(on_cpu, monkeypatch):
    """Four shapes in two halves, and something in the place of torch."""
    sides = [(256, 128, 128), (256, 256, 128), (512, 128, 128), (512, 128, 256)]
    shapes = [_models.Shape(*s) for s in sides]
    monkeypatch.setattr(gemm_models, "shapes", lambda: shapes)
    monkeypatch.setattr(gemm_models, "half", lambda s: _models.HALVES[s.m // 512])
    torch = {gemm_models.OTHER: lambda: jnp.ones(())}
    monkeypatch.setattr(gemm_models._contenders, "torch_gemms", lambda *_: torch)

    def take(*times):
        """What the contenders take, shape by shape, in the order of their turns."""
        left = iter(times)

        def alternate(contenders, rounds):
            assert rounds == 1
            for launch in contenders.values():
                launch()
            return dict(zip(contenders, next(left), strict=True))

        monkeypatch.setattr(_harness, "alternate_kernels", alternate)

    return on_cpu, shapes, take


def test_gemm_of_models_in_halves(two_contenders, monkeypatch, capsys):
    folder, shapes, take = two_contenders
    take((1, 2), (2, 4), (4, 8), (8, 4))
    run(monkeypatch, gemm_models, "--rounds 1 --commit abc")
    found = rows(folder / "gemm_models.csv")
    assert [r["half"] for r in found] == ["tune", "report"] * 2
    assert sorted((int(r["m"]), int(r["n"]), int(r["k"])) for r in found) == shapes
    assert [r["ratio"] for r in found] == ["2.000", "2.000", "2.000", "0.500"]
    printed = capsys.readouterr().out
    tune = "median 2.000, geometric mean 2.000, least 2.000, 0 below 1"
    report = "median 1.250, geometric mean 1.000, least 0.500, 1 below 1"
    assert f"tune, 2 shapes: {tune}" in printed
    assert f"report, 2 shapes: {report}" in printed


def test_orders_of_blocks_are_compared_on_the_tuning_half(
    two_contenders, monkeypatch, capsys
):
    folder, _, take = two_contenders

    def multiply(*args, config, **static):
        if config.cluster == 2:
            raise RuntimeError("no clusters")
        return xla.gemm(*args, **static)

    monkeypatch.setattr(mosaic_gpu, "multiply", multiply)
    # With no cluster two axes by two widths run, the chosen order first.
    take((4, 2, 3, 8, 6))
    run(monkeypatch, gemm_models, "--candidates --shapes 1 --rounds 1")
    found = rows(folder / "gemm_candidates.csv")
    assert {r["m"] for r in found} == {"256"}
    assert [r["chosen"] for r in found] == ["1", "0", "0", "0"]
    assert [r["ratio"] for r in found] == ["1.500", "3.000", "2.000", "0.750"]
    printed = capsys.readouterr().out
    assert "cluster 2, 8 along m is left out: no clusters" in printed
    assert "2.0  2.000  3.000 cluster 1, 16 along m" in printed
    assert "4.0  1.000  1.500 cluster 1, 8 along m (chosen)" in printed


def test_products_of_models_are_those_of_both_passes_in_fixed_halves():
    shapes = _models.shapes()
    assert len(shapes) == len(set(shapes))
    # Llama 3 8B, config.json: hidden_size 4096, 32 heads of 128, 8 of keys and values,
    # intermediate_size 14336: q and o, k and v, gate and up, down.
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        assert {_models.Shape(8192, n, k), _models.Shape(8192, k, n)} <= {*shapes}
    sides = {}
    for shape in shapes:
        sides.setdefault(frozenset(shape[1:]), set()).add(_models.half(shape))
    assert all(len(halves) == 1 for halves in sides.values())
    counts = [sum(_models.half(s) == h for s in shapes) for h in _models.HALVES]
    assert min(counts) > 0.4 * len(shapes)


def test_orders_of_a_choice_can_run_and_begin_with_it():
    chosen = mosaic_gpu.choose_config("1d2d", 8192, 4096, 4096, "bfloat16", 132)
    found = gemm_models.orders(chosen)
    assert found[0] == chosen
    assert len(found) == len({*found}) == 8
    assert all(mosaic_gpu.refusal("1d2d", c) is None for c in found)


def test_what_does_not_run_is_left_out_and_says_why(capsys):
    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand so on")

    found = _harness.working({"a": lambda: jnp.ones(2), "b": fails})
    assert list(found) == ["a"]
    printed = capsys.readouterr().out
    assert printed == "b is left out: RESOURCE_EXHAUSTED: Out of memory\n"


def test_a_slow_contender_has_fewer_launches(monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(_harness, "time", clock)
    monkeypatch.setattr(_harness, "TURN_US", 4e4)
    calls = {"slow": 0, "fast": 0}

    def of(name, seconds):
        def launch():
            calls[name] += 1
            now[0] += seconds
            return jnp.zeros(())

        return launch

    contenders = {"slow": of("slow", 0.015), "fast": of("fast", 0.001)}
    found = _harness.alternate(contenders, launches=20, rounds=2)
    assert calls == {"slow": 3 + 2 * 2, "fast": 3 + 2 * 20}
    assert found == pytest.approx({"slow": 15e3, "fast": 1e3})


def test_layer_beside_bf16_with_its_kernels(on_cpu, monkeypatch):
    monkeypatch.setattr(layer, "SHAPES", [(128, 256, 384)])
    recipes = "deepseek_v3 bf16_wgrad"
    run(monkeypatch, layer, f"--rounds 1 --hlo --recipe {recipes}")
    base, *fp8 = rows(on_cpu / "layer.csv")
    assert base["contender"] == "jax bf16"
    assert base["wall_speedup"] == base["kernel_speedup"] == "1.000"
    assert [r["contender"] for r in fp8] == ["fp8jax deepseek_v3", "fp8jax bf16_wgrad"]
    kernels = (on_cpu / "layer_kernels.txt").read_text()
    assert "deepseek_v3: tokens 128, in 256, out 384" in kernels
    assert "bf16_wgrad: tokens 128" in kernels
    assert "OTHER" in kernels


def test_narrow_steps_are_in_fp8_but_for_nothing(on_cpu, monkeypatch):
    monkeypatch.setattr(narrow, "LAYERS", 2)
    options = "--widths 128 --tokens 256 --rounds 1 --commit abc"
    run(monkeypatch, narrow, f"{options} --square-in-bf16")
    (row,) = rows(on_cpu / "narrow.csv")
    assert row["square_in_bf16"] == "1"
    assert (row["tokens"], row["width"], row["recipe"]) == ("256", "128", "deepseek_v3")
    speed = float(row["bf16_us"]) / float(row["fp8_us"])
    assert float(row["speed"]) == pytest.approx(speed, rel=0.01)
    arrays = jax.eval_shape(functools.partial(narrow._arrays, 256, 128))
    report = fp8jax.fp8_transform(narrow._step).report(*arrays)
    assert report.fraction == 1
    assert len(report.rows) == 3 * len(["q", "k", "v", "o", "gate", "up", "down"])


def test_batches_of_experts_are_in_fp8_in_both_forms(on_cpu, monkeypatch):
    tiny = {"tiny": batched.Experts(2, 128, 256)}
    monkeypatch.setattr(batched, "MODELS", tiny)
    run(monkeypatch, batched, "--models tiny --rows 128 --rounds 1 --commit abc")
    found = rows(on_cpu / "batched.csv")
    assert [(r["model"], r["form"], r["rows"]) for r in found] == [
        ("tiny", form, "128") for form in batched.FORMS
    ]
    params, x = batched._arrays(tiny["tiny"], 128)
    both = [batched._loss(mlp, params, x) for mlp in batched._MLPS.values()]
    np.testing.assert_allclose(*both, rtol=2**-8)  # One product, rounded to bfloat16.


def test_every_recipe_of_the_layer_benchmark_has_fp8_in_it():
    arrays = layer.layer_arrays(128, 256, 384)
    for name, recipe in layer.RECIPES.items():
        outputs = jax.jit(layer.dense_layer(recipe))(*arrays)
        assert [o.shape for o in outputs] == [(128, 384), (128, 256), (256, 384)], name
        hlo = layer.dense_layer(recipe).lower(*arrays).as_text()
        assert "f8E4M3FN" in hlo, name


def test_decode(on_cpu, monkeypatch):
    monkeypatch.setattr(decode, "SHAPES", [(256, 384)])
    monkeypatch.setattr(decode, "COLD_BYTES", 256 * 384)
    run(monkeypatch, decode, "--tokens 1 16 --rounds 1")
    one, two = rows(on_cpu / "decode.csv")
    assert (one["m"], two["m"], one["n"], one["k"]) == ("1", "16", "256", "384")
    assert float(one["of_copy"]) > 0
    assert one["cublaslt_us"] == ""


def test_inference_of_all_contenders_with_their_kernels(on_cpu, monkeypatch):
    sizes = inference.Sizes(width=256, hidden=384, queries=256, keys=128)
    monkeypatch.setattr(inference, "SIZES", sizes)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote.
        run(monkeypatch, inference, "--layers 1 --tokens 16 --rounds 1 --hlo")
    found = rows(on_cpu / "inference.csv")
    assert [r["contender"] for r in found] == [*inference.KINDS]
    base, *fp8 = found
    weights = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 384
    assert int(base["weight_bytes"]) == 2 * weights
    # Codes, and a scale of four bytes for 128x128 of them.
    assert all(int(r["weight_bytes"]) == weights + weights // 4096 for r in fp8)
    # FP8 products carry about 27 dB; a step that multiplies something else has none.
    assert all(float(r["sqnr_db"]) > 20 for r in found)
    assert "fp8 fused: m 16" in (on_cpu / "inference_kernels.txt").read_text()


def test_plot_of_measured_rows_and_again_from_the_csv(on_cpu, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot_m, "SHAPES", [(256, 128), (128, 384)])
    run(monkeypatch, plot_m, "--tokens 1 16 64")
    png = on_cpu / "gemm_by_m.png"
    first = png.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert len(rows(on_cpu / "gemm_by_m.csv")) == 6
    png.unlink()
    run(monkeypatch, plot_m, "--plot-only")
    assert png.read_bytes() == first


def test_plot_only_without_a_csv_says_what_to_do(on_cpu, monkeypatch, capsys):
    del on_cpu
    with pytest.raises(SystemExit):
        run(monkeypatch, plot_m, "--plot-only")
    assert "measure first" in capsys.readouterr().err


def test_ceiling_is_the_memory_s_for_few_rows_and_the_peak_for_many():
    # One row: 7168 * 2048 bytes of weight at 4300 GB/s are 3.41 us.
    # 2 * 7168 * 2048 FLOP in 3.41 us: 8.6 TFLOP/s, by hand to two digits.
    assert plot_m._ceiling(1, 7168, 2048) == pytest.approx(8.58, rel=1e-2)
    assert plot_m._ceiling(65536, 7168, 2048) == 1979


HLO = """\
HloModule jit_run, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%fused (p.1: f32[2]) -> f32[2] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p.1, %p.1)
}

%command_buffer (p.2: f8e4m3fn[4,2]) -> (bf16[4,2], bf16[4,2]) {
  %p.2 = f8e4m3fn[4,2]{1,0} parameter(0)
  %gemm.1 = bf16[4,2]{1,0} custom-call(%p.2), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(run)/jit(fp8jax::gemm_mosaic_gpu)/pallas_call" source_line=1}
  %gemm.2 = bf16[4,2]{1,0:S(1)} custom-call(%p.2), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(run)/jit(fp8jax::gemm_mosaic_gpu)/pallas_call" source_line=1}
  ROOT %t = (bf16[4,2]{1,0}, /*index=1*/bf16[4,2]{1,0}) tuple(%gemm.1, %gemm.2)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0), metadata={op_name="x"}
  %call = (bf16[4,2]{1,0}, /*index=1*/bf16[4,2]{1,0}) call(%x), to_apply=%command_buffer
  %cp = f32[2,3]{0,1} copy(%x), metadata={op_name="jit(run)/transpose"}
  %start = (f32[2]{0}, f32[2]{0}, u32[]) copy-start(%x)
  %done = f32[2]{0} copy-done(%start)
  ROOT %fusion = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused, \
metadata={op_name="jit(run)/add"}
}
"""


def test_hlo_list_shows_every_launch_ours_first():
    found = _hlo.launches(HLO)
    assert dict(found) == {
        (
            "custom-call",
            "mosaic_gpu_v2 jit(fp8jax::gemm_mosaic_gpu) pallas_call",
            "bf16[4,2]",
        ): 2,
        ("copy", "transpose", "f32[2,3]"): 1,
        ("copy-start", "?", "(f32[2], f32[2], u32[])"): 1,
        ("fusion", "add", "f32[2]"): 1,
    }
    lines = _hlo.report(HLO)
    assert lines[0].split()[:2] == ["2", "kernel"]
    assert [line.split()[1] for line in lines[1:]] == ["OTHER"] * 3


def test_hlo_list_of_a_real_program():
    def f(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) @ y, x)

    text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
    assert text is not None
    opcodes = {launch.opcode for launch in _hlo.launches(text)}
    assert opcodes & {"dot", "fusion", "custom-call"}
    assert not opcodes & {"while", "call", "parameter"}


def test_contenders_take_turns():
    turns = []

    def clock(name):
        def run():
            turns.append(name)
            return [float(len(turns))]

        return run

    names = ("a", "b")
    medians = _harness.alternate_clocks({n: clock(n) for n in names}, rounds=3)
    assert turns == ["a", "b"] * 3
    assert medians == {"a": 3.0, "b": 4.0}


@pytest.fixture
def fake_sanitizer(monkeypatch, tmp_path):
    """A compute-sanitizer that finds something with racecheck, and says how it ran."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$@" $XLA_PYTHON_CLIENT_PREALLOCATE\n'
        'if [ "$2" = racecheck ]; then echo RACE; exit 9; fi\n'
        "printf '%s\\n' a b c 'ERROR SUMMARY: 0 errors'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("fake_sanitizer")
def test_sanitizer_prints_last_lines_and_fails_where_one_found_something(
    monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="not clean: racecheck"):
        run(monkeypatch, sanitize, "--tools memcheck racecheck")
    printed = capsys.readouterr().out
    clean = "a\nb\nc\nERROR SUMMARY: 0 errors\n"
    for part in range(sanitize.PARTS):
        title = f"part {part + 1} of {sanitize.PARTS}"
        assert f"== memcheck, {title}\n{clean}==" in printed
        assert f"== racecheck, {title}\n--tool racecheck" in printed
        assert f"benchmarks.sanitize --inside {part} false\nRACE" in printed
    run(monkeypatch, sanitize, "--tools synccheck")


def test_sanitizer_that_is_not_there_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        run(monkeypatch, sanitize)
    assert "finds no compute-sanitizer" in capsys.readouterr().err


def test_sanitized_program_compares_every_kernel(monkeypatch, capsys):
    def by_xla(name):
        # Compiled as a whole, not step by step.
        def run(*args, accumulate=None, **static):
            if accumulate is not None:
                args = *args, accumulate
            return sanitize._by_xla(name, *args, **static)

        return run

    def multiply(*args, config, **static):
        del config
        return by_xla("gemm")(*args, **static)

    monkeypatch.setattr(sanitize, "every_gemm_config", lambda *_: [None])
    # One row, and rows in several groups.
    monkeypatch.setattr(sanitize, "SHAPES", sanitize.SHAPES[::2])
    kernels = dir(sanitize.mosaic_gpu)
    replaced = [n for n in kernels if n.startswith(("quantize", "grouped"))]
    for name in ("gemm", "gemm_swiglu", *replaced):
        monkeypatch.setattr(sanitize.mosaic_gpu, name, by_xla(name))
    monkeypatch.setattr(sanitize.mosaic_gpu, "multiply", multiply)

    def multiply_rows(*args, config, out_dtype):
        assert config.cluster == 2
        tiles = {"lhs_tile": (1, 128), "rhs_tile": (128, 128)}
        return by_xla("grouped_gemm")(*args, **tiles, out_dtype=out_dtype)

    monkeypatch.setattr(sanitize.mosaic_gpu, "multiply_rows", multiply_rows)

    def run_all():
        for part in range(sanitize.PARTS):
            sanitize.run_kernels(part)

    run_all()
    printed = capsys.readouterr().out
    assert printed.count("results of Mosaic kernels are right") == sanitize.PARTS

    def wrong(*args, **static):
        return multiply(*args, **static) + 1

    monkeypatch.setattr(sanitize.mosaic_gpu, "multiply", wrong)
    with pytest.raises(AssertionError, match=r"1d2d of .* to bfloat16 with None"):
        run_all()

    monkeypatch.setattr(sanitize.mosaic_gpu, "multiply", multiply)
    monkeypatch.setattr(
        sanitize.mosaic_gpu,
        "grouped_gemm_k",
        lambda *args, **static: by_xla("grouped_gemm_k")(*args, **static) + 1,
    )
    with pytest.raises(AssertionError, match=r"grouped_gemm_k \w+ of .*"):
        run_all()


@pytest.mark.parametrize("op", quantize.OPS, ids=lambda op: op.what)
@pytest.mark.parametrize("kernels", [mosaic_gpu, xla], ids=["mosaic_gpu", "xla"])
def test_every_quantization_measured_writes_what_is_counted(kernels, op):
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    inputs = [x] * op.inputs
    if op.kernel == "quantize_rms_norm":
        inputs = [x, jax.ShapeDtypeStruct((512,), jnp.bfloat16)]
    out = jax.eval_shape(functools.partial(quantize._run, op, kernels), *inputs)
    codes = [a.size for a in jax.tree.leaves(out) if a.dtype.itemsize == 1]
    assert codes == [x.size] * op.outputs
