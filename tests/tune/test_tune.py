"""`python -m fp8jax.tune`: explanations anywhere, clear errors without a GPU."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from fp8jax import recipes, tune
from fp8jax.kernels import mosaic_gpu
from fp8jax.testing import GEMM_SHAPES
from fp8jax.tune import __main__ as cli
from fp8jax.tune import _against, _explain, _measure

SHAPES = [(s.m, s.n, s.k) for s in GEMM_SHAPES]
SHAPES += [(1, 7168, 16384), (64, 576, 7168), (128, 24576, 1536), (257, 1, 3884)]
both_kinds = pytest.mark.parametrize("kind", mosaic_gpu.GEMM_KINDS)


@both_kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_fit_the_machine_and_begin_with_the_computed_one(shape, kind):
    candidates = mosaic_gpu.gemm_candidates(kind, *shape, "bfloat16", 132)
    computed = mosaic_gpu.computed_config(kind, *shape, "bfloat16", 132)
    assert candidates[0] == computed
    assert len(candidates) == len(set(candidates)) > 1
    assert [mosaic_gpu.refusal(kind, c) for c in candidates] == [None] * len(candidates)


@both_kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_explanation_is_consistent(shape, kind):
    e = tune.explain(kind, *shape)
    m, n, _ = shape
    rows, columns = e.blocks
    assert e.config == mosaic_gpu.choose_config(kind, *shape, "bfloat16", 132)
    of_m, of_n = e.config.covers
    assert (rows - 1) * of_m < m <= rows * of_m
    assert (columns - 1) * of_n < n <= columns * of_n
    assert (e.waves - 1) * 132 < rows * columns + e.config.cluster * columns
    assert 0 < e.wave_efficiency <= 1
    assert e.tflops("tensor cores") <= 1979
    assert e.smem_bytes <= mosaic_gpu.SMEM_BYTES
    assert e.bounds_us[e.limit] == max(e.bounds_us.values())


def test_model_of_shared_memory_counts_160_bytes_a_cycle_for_128x128():
    # As counted by hand: 32 KB written and 48 KB read in 512 cycles of wgmma.
    problem = mosaic_gpu.GemmProblem("1d2d", 8192, 8192, 8192, "bfloat16")
    computed = mosaic_gpu.computed_config("1d2d", 8192, 8192, 8192, "bfloat16", 132)
    config = dataclasses.replace(computed, block_m=128, block_n=128, split="m")
    bounds = _explain._bounds(problem, config, waves=1)
    ratio = bounds["shared memory"] / bounds["tensor cores"]
    assert ratio == pytest.approx(160 / 128)


def test_explain_prints_without_a_gpu(capsys):
    cli.main("--explain 1 7168 16384 4096 4096 7168 --num-sms 114".split())  # noqa: SIM905
    printed = capsys.readouterr().out
    for words in ("out, 114 SMs", "wave efficiency", "bound by", "another m is"):
        assert printed.count(words) == 2, printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("1 2", "takes M N K"),
        ("--explain 1 2 0", "integers from 1"),
        ("--explain --kind 2d2d 1 2 3", "invalid choice: '2d2d'"),
        ("128 128 128", "measuring needs a GPU of compute capability 9.0"),
        ("--against bf16 8 8 8", "measuring needs a GPU of compute capability 9.0"),
        ("--against fp16 8 8 8", "invalid choice: 'fp16'"),
        ("--explain --table none.json 1 2 3", "No such file"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


class FakeProgram:
    """Its own jit, lowering and executable; takes as long as its place tells.

    The second one does not compile, and the third gives other bits.
    """

    def __init__(self, place):
        self.us = 100.0 - place
        self.place = place

    def lower(self):
        return self

    def compile(self):
        if self.place == 1:
            raise RuntimeError("ptxas exhausted [registers]\nand more")
        return self

    def __call__(self):
        return jnp.float32(self.place == 2)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU on which candidates take the less time the later they are listed."""
    pytest.importorskip("rich")
    places = itertools.count()
    monkeypatch.setattr(_measure, "_operands", lambda problem: ())
    monkeypatch.setattr(_measure, "_jitted", lambda *_: FakeProgram(next(places)))
    monkeypatch.setattr(
        _measure, "kernel_times", lambda program, iterations: [program.us] * iterations
    )
    monkeypatch.setattr(cli, "check_available", lambda name: None)
    monkeypatch.setattr(mosaic_gpu, "present_device_kind", lambda: "NVIDIA H200")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("fake_gpu")
def test_the_fastest_that_runs_with_the_same_bits_is_written(tmp_path, capsys):
    path = tmp_path / "table.json"
    cli.main(["128", "7168", "2048", "--out", str(path)])
    printed = capsys.readouterr().out
    assert "RuntimeError: ptxas exhausted [registers]" in printed
    assert "gives other bits" in printed
    (entry,) = json.loads(path.read_text())["entries"]
    candidates = mosaic_gpu.gemm_candidates("1d2d", 128, 7168, 2048, "bfloat16", 132)
    assert entry["us"] == 100 - (len(candidates) - 1)
    assert entry["computed_us"] == 100
    table = mosaic_gpu.read_table(path, device_kind="NVIDIA H200", num_sms=132)
    assert [e.config for e in table.entries.values()] == [candidates[-1]]


@pytest.mark.usefixtures("fake_gpu")
def test_a_table_that_cannot_be_added_to_is_refused_before_measuring(tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["128", "7168", "2048", "--out", str(path)])
    assert "has schema None" in capsys.readouterr().err
    assert path.read_text() == "{}"


@pytest.mark.usefixtures("fake_gpu")
def test_two_shapes_of_one_bucket_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["3900", "256", "256", "4000", "256", "256"])
    assert "m of 3585 to 4096 share one entry" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_gpu")
def test_without_rich_it_says_so_before_measuring(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "fp8jax.tune._view", raising=False)
    monkeypatch.delattr(tune, "_view", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["128", "7168", "2048"])
    message = "measuring needs rich, which is missing here: pip install 'fp8jax[tune]'"
    assert message in capsys.readouterr().err


def test_a_gain_within_the_noise_keeps_the_computed_config():
    problem = mosaic_gpu.GemmProblem("1d2d", 128, 256, 256, "bfloat16")
    first, second = mosaic_gpu.gemm_candidates("1d2d", 128, 256, 256, "bfloat16", 132)[
        :2
    ]
    for us, expected in ((99.5, first), (98.0, second)):
        timings = [_measure.Timing(first, 100.0, 1), _measure.Timing(second, us, 1)]
        entry = _measure.best(problem, timings)
        assert entry is not None
        assert entry.config == expected
    assert _measure.best(problem, [_measure.Timing(first, None, 1)]) is None


def test_kernel_times_without_a_gpu_says_so():
    with pytest.raises(ValueError, match="iterations >= 2, got 1"):
        tune.kernel_times(jax.jit(lambda x: x), jnp.ones(()), iterations=1)


@pytest.mark.gpu
def test_measures_on_this_gpu(tmp_path, capsys):
    path = tmp_path / "table.json"
    cli.main(["128", "1024", "512", "--out", str(path), "--rounds", "2"])
    assert "fastest" in capsys.readouterr().out
    tune.load_tuning(path)
    try:
        e = tune.explain("1d2d", 128, 1024, 512)
        assert e.source.startswith("the loaded table: measured")
    finally:
        tune.load_tuning(None)


def test_kernel_times_are_sums_over_a_call_s_kernels(monkeypatch):
    from jax.experimental.mosaic.gpu import profiler

    seen = [[("a", 0.001), ("b", 0.002)], [("a", 0.004), ("b", 0.002)]]

    def measure(fn, aggregate, iterations):
        assert (aggregate, iterations) == (False, 2)
        return lambda *args: (fn(*args), seen)

    monkeypatch.setattr(profiler, "measure", measure)
    times = tune.kernel_times(lambda x: x, 1, iterations=2)
    assert times == pytest.approx([3.0, 6.0])
    seen.clear()
    with pytest.raises(RuntimeError, match="CUPTI saw no kernel"):
        tune.kernel_times(lambda x: x, 1, iterations=2)


def test_layer_against_bf16_counts_products_and_the_rest_apart(monkeypatch):
    calls = {
        "fp8": [("fp8jax_gemm_1d2d_8x8x8", 2.0), ("fp8jax_quantize_1x128_8x8", 1.0)],
        "bf16": [("nvjet_hsh_128x128", 4.0), ("loop_convert_fusion", 0.5)],
    }
    monkeypatch.setattr(_against, "dense_layer", lambda recipe: recipe.is_off)

    def kernels_of(is_off, x, w, dout, iterations):
        assert (x.shape, w.shape, dout.shape) == ((64, 256), (256, 128), (64, 128))
        return [calls["bf16" if is_off else "fp8"]] * iterations

    monkeypatch.setattr(_against, "kernels_of", kernels_of)
    found = tune.against_bf16(64, 128, 256, recipes.deepseek_v3(), rounds=1)
    assert (found.bf16_us, found.gemm_us, found.other_us) == (4.5, 2.0, 1.0)
    assert found.speed == 1.5
    assert "[64, 256] x [256, 128]" in str(found)
    assert "1.50 times BF16's speed: FP8 pays here." in str(found)
    slow = dataclasses.replace(found, other_us=4.0)
    assert "0.75 times BF16's speed: FP8 does not pay here." in str(slow)


@pytest.mark.gpu
def test_layer_against_bf16_on_this_gpu(capsys):
    cli.main(["--against", "bf16", "4096", "2048", "2048", "--rounds", "1"])
    assert "times BF16's speed" in capsys.readouterr().out
