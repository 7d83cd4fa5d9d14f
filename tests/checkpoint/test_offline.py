"""Offline quantization: `quantize`'s bits, whatever the model's size or fate."""

import errno
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import fp8jax
from fp8jax import checkpoint
from fp8jax.checkpoint import WeightRules, _ahead, _band, _stream, _write
from fp8jax.testing import ALL_BF16, ALL_FP16, assert_same_bits, quantize_numpy

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=BF16):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    return {
        "model.embed_tokens.weight": normal(256, 128),
        "model.layers.0.mlp.up_proj.weight": normal(384, 256),
        "model.layers.0.mlp.down_proj.weight": normal(256, 384, dtype=np.float32),
        "model.layers.0.mlp.gate.weight": normal(128, 256),
        "model.layers.0.mlp.experts.gate_up_proj": normal(2, 256, 128),
        "model.layers.0.kv_a_proj.weight": normal(576, 256),
        "model.layers.0.input_layernorm.weight": normal(256),
        "lm_head.weight": normal(256, 256),
        "steps": np.asarray([7]),
    }


@pytest.fixture
def source(tensors, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("[]")
    return folder


FP8 = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
)


@pytest.mark.parametrize("elements", [40_000, 1 << 20])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_file_holds_the_bits_of_quantize_and_of_the_oracle(
    source, tensors, tmp_path, scale, elements, monkeypatch
):
    monkeypatch.setattr(_stream, "_BAND_ELEMENTS", elements)  # Bands of any height.
    rules = WeightRules(scale=scale, ragged=True)
    outcomes = checkpoint.quantize_checkpoint(source, tmp_path / "out", rules)
    loaded = checkpoint.load(tmp_path / "out")
    ragged = "model.layers.0.kv_a_proj.weight"
    for name, x in tensors.items():
        if name not in (*FP8, ragged):
            assert_same_bits(loaded[name], x.astype(np.int32) if name == "steps" else x)
            continue
        q = loaded[name]
        matrices = zip(
            *(a.reshape(-1, *a.shape[-2:]) for a in (x, q.data, q.scale)), strict=True
        )
        for matrix, *stored in matrices:
            oracle = quantize_numpy(matrix, (128, 128), pow2=scale == "ue8m0")
            assert_same_bits(tuple(stored), oracle)
        if scale == "ue8m0":  # Else XLA's division may move a code at a tie.
            assert_same_bits(q, fp8jax.quantize(jnp.asarray(x), rules.spec))
        (outcome,) = (o for o in outcomes if o.name == name)
        exact = x.astype(np.float64)
        error = np.asarray(q.dequantize()) - exact
        expected = 10 * np.log10(np.sum(exact**2) / np.sum(error**2))
        # Sums of 1e5 positive float32 terms: 1e5 * 2^-24 relative, in dB.
        assert outcome.sqnr_db == pytest.approx(expected, abs=0.03)
        assert outcome.bytes_in == x.nbytes
    reader = checkpoint.Reader(tmp_path / "out")
    assert [o.bytes_out for o in outcomes] == [reader[o.name].nbytes for o in outcomes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
def test_a_band_has_the_oracle_s_bits_whatever_it_holds(dtype, kind):
    spec = fp8jax.QuantSpec(tile=(128, 128), scale=kind)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 520)) * np.exp(rng.normal(0, 6, (300, 520)))
    x[:128, :128] = 0
    x[0, 200], x[200, 0] = np.nan, np.inf
    x[256:, 256:384] *= 1e-42  # Subnormal, even the largest.
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    band = _band.quantize_band(x, spec)
    oracle = functools.partial(quantize_numpy, tile=spec.tile, pow2=kind == "pow2")
    assert_same_bits((band.codes, band.scale), oracle(x))
    assert np.isnan(band.error)
    y = np.where(np.isfinite(x), x, 0).astype(dtype)
    band = _band.quantize_band(y, spec)
    exact = y.astype(np.float64)
    values = fp8jax.QTensor(*map(jnp.asarray, oracle(y)), spec.tile).dequantize()
    off = np.asarray(values, np.float64) - exact
    # Of the quotients' squares and errors: each is off by 2^-24 of itself, which of an
    # error is 2^-20 at most, and 128 are added in float32.
    assert band.error == pytest.approx(np.sum(off**2), rel=2**-17)
    assert band.signal == pytest.approx(np.sum(exact**2), rel=2**-17)


CODES = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)  # 0 to 448.
MIDDLES = (CODES[1:] + CODES[:-1]) / 2  # Exact: a code has four bits.
EDGES = np.concatenate(
    [CODES, MIDDLES, np.nextafter(MIDDLES, np.float32(0)), np.nextafter(MIDDLES, 448)]
).astype(np.float32)
ANY = np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint32).view(np.float32)


@pytest.mark.parametrize(
    "values",
    [EDGES, ALL_BF16, ALL_FP16, ANY],
    ids=["edges", "bfloat16", "float16", "float32"],
)
def test_a_band_s_codes_are_those_of_a_cast(values):
    values = values[np.abs(values.astype(np.float32)) <= 448].ravel()
    values = np.concatenate([values, -values])
    x = np.zeros((128, -(-len(values) // (127 * 128)) * 128), values.dtype)
    x[1:].reshape(-1)[: len(values)] = values
    x[0] = 448  # The scale is one.
    band = _band.quantize_band(x, fp8jax.QuantSpec(tile=(128, 128)))
    assert (band.scale == 1).all()
    assert_same_bits(band.codes, x.astype(np.float32).astype(E4M3))


def test_config_and_other_files_come_along(source, tmp_path):
    checkpoint.quantize_checkpoint(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "x"
    kept = config["quantization_config"]["modules_to_not_convert"]
    assert kept == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.kv_a_proj",
        "model.layers.0.mlp.gate",
    ]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, FP8),
        ({"exclude": ["down", "experts"]}, FP8[:1]),
        ({"include": ["up_proj.weight"]}, FP8[:1]),
        ({"include": ["lm_head"]}, ("lm_head.weight",)),
        ({"include": ["lm_head"], "exclude": ["head"]}, ()),
        ({"include": ["norm"]}, ()),
    ],
)
def test_rules_choose(source, tmp_path, rules, expected):
    outcomes = checkpoint.quantize_checkpoint(
        source, tmp_path / "out", WeightRules(**rules), dry_run=True
    )
    assert {o.name for o in outcomes if not o.note} == set(expected)
    assert all(o.note for o in outcomes if o.name not in expected)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_quantize_params_is_the_same_for_a_tree_in_either_orientation(source, tensors):
    rules = WeightRules()
    hf = checkpoint.quantize_params(checkpoint.load(source), rules)
    chosen = {n for n, x in hf.items() if isinstance(x, fp8jax.QTensor)}
    assert chosen == set(FP8)
    flax = checkpoint.quantize_params(checkpoint.load(source, layout="flax"), rules)
    kernel = flax["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert_same_bits(kernel.T, hf[FP8[0]])
    again = checkpoint.quantize_params(hf, rules)
    assert_same_bits(again, hf)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_is_codes_times_scale(source, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(_stream, "_BAND_ELEMENTS", 40_000)
    rules = WeightRules(ragged=True)
    checkpoint.quantize_checkpoint(source, tmp_path / "q", rules)
    checkpoint.dequantize_checkpoint(tmp_path / "q", tmp_path / "d", dtype=dtype)
    quantized, plain = checkpoint.load(tmp_path / "q"), checkpoint.load(tmp_path / "d")
    for name, x in quantized.items():
        fp8 = isinstance(x, fp8jax.QTensor)
        assert_same_bits(plain[name], x.dequantize(dtype) if fp8 else x)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config == {"model_type": "x"}


def test_diff_tells_bits_values_shapes_and_absence(source, tmp_path):
    checkpoint.quantize_checkpoint(source, tmp_path / "q")
    checkpoint.dequantize_checkpoint(tmp_path / "q", tmp_path / "d", dtype="float32")
    assert {d.what for d in checkpoint.diff(source, source)} == {"same bits"}
    there = {d.name: d for d in checkpoint.diff(tmp_path / "q", tmp_path / "d")}
    assert {n for n, d in there.items() if d.what == "same values"} == set(FP8)
    lossy = {d.name: d for d in checkpoint.diff(source, tmp_path / "q")}
    outcomes = checkpoint.quantize_checkpoint(source, tmp_path / "r")
    for o in outcomes:
        if o.name in FP8:
            assert lossy[o.name].sqnr_db == pytest.approx(o.sqnr_db, abs=0.03)
    safetensors.numpy.save_file(
        {"steps": np.ones(2, "i8"), "x": np.ones(1)}, tmp_path / "x.safetensors"
    )
    other = {
        d.name: d.what for d in checkpoint.diff(source, tmp_path / "x.safetensors")
    }
    assert other.pop("steps") == "other shape"
    assert other.pop("x") == "only in the second"
    assert set(other.values()) == {"only in the first"}


def test_diff_does_not_lose_a_nan(tmp_path):
    for name, value in (("a", 1.0), ("b", np.nan)):
        x = np.ones((4, 4), np.float32)
        x[1, 2] = value
        safetensors.numpy.save_file({"w": x}, tmp_path / f"{name}.safetensors")
    (d,) = checkpoint.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert d.what == "differs"
    assert np.isnan(d.largest)


def test_histogram_counts_every_code(source, tmp_path):
    checkpoint.quantize_checkpoint(source, tmp_path / "q")
    reader = checkpoint.Reader(tmp_path / "q")
    counts = checkpoint.code_histogram(reader, FP8[0])
    codes = reader.codes(FP8[0]).view(np.uint8)
    assert counts.tolist() == [int((codes == c).sum()) for c in range(256)]
    with pytest.raises(ValueError, match="takes an FP8 weight, got bfloat16"):
        checkpoint.code_histogram(reader, "lm_head.weight")


def test_a_run_that_stopped_is_taken_up_where_it_was(source, tmp_path, monkeypatch):
    expected = tmp_path / "expected"
    checkpoint.quantize_checkpoint(source, expected)
    ran = []
    plain = _stream.copy_work

    def stops_at(last):
        def work(*args, name, **kwargs):
            pieces, finish = plain(*args, name=name, **kwargs)

            def first():
                ran.append(name)
                if name == last:
                    raise KeyboardInterrupt
                return 0

            return _ahead.Work([first, *pieces], finish)

        return work

    copied = [
        o.name
        for o in checkpoint.quantize_checkpoint(source, tmp_path / "dry", dry_run=True)
        if o.note
    ]
    monkeypatch.setattr("fp8jax.checkpoint._offline.copy_work", stops_at(copied[2]))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.quantize_checkpoint(source, tmp_path / "out")
    assert set(copied[:3]) <= set(ran)
    ran.clear()
    with open(tmp_path / ".out.partial" / "progress.jsonl", "a") as journal:
        journal.write('{"name": "cut sho')
    monkeypatch.setattr("fp8jax.checkpoint._offline.copy_work", stops_at(None))
    outcomes = checkpoint.quantize_checkpoint(source, tmp_path / "out")
    assert sorted(ran) == sorted(copied[2:])
    assert len(outcomes) == 9
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected", "in", "out"]


def test_other_rules_do_not_take_up_a_run(source, tmp_path):
    def stop(nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.quantize_checkpoint(source, tmp_path / "out", progress=stop)
    rules = WeightRules(scale="ue8m0")
    checkpoint.quantize_checkpoint(source, tmp_path / "out", rules)
    checkpoint.quantize_checkpoint(source, tmp_path / "b", rules)
    differences = checkpoint.diff(tmp_path / "out", tmp_path / "b")
    assert {d.what for d in differences} == {"same bits"}


def test_refusals_name_what_came(source, tmp_path):
    checkpoint.quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(ValueError, match="q is there already"):
        checkpoint.quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(ValueError, match="another folder than the source"):
        checkpoint.quantize_checkpoint(source, source, overwrite=True)
    with pytest.raises(ValueError, match=r"not FP8 yet, got 'model\.layers\.0"):
        checkpoint.quantize_checkpoint(tmp_path / "q", tmp_path / "r")
    with pytest.raises(ValueError, match=r"regular expressions, got '\('"):
        WeightRules(include=["("])
    with pytest.raises(ValueError, match="'fp32' or 'ue8m0', got 'pow2'"):
        WeightRules(scale="pow2")
    with pytest.raises(ValueError, match="9 tensors stay, because excluded"):
        checkpoint.quantize_checkpoint(
            source, tmp_path / "q", WeightRules(exclude=["."]), overwrite=True
        )
    with pytest.raises(ValueError, match="finds no FP8 weight in"):
        checkpoint.dequantize_checkpoint(source, tmp_path / "r")
    assert sorted(os.listdir(tmp_path)) == ["in", "q"]


# Of this program alone: ru_maxrss would count the parent's pages before exec.
MEMORY = """
import pathlib, re, sys
from fp8jax import checkpoint
checkpoint.quantize_checkpoint(sys.argv[1], sys.argv[2])
status = pathlib.Path("/proc/self/status").read_text()
print(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("shape", "count"), [((8192, 4096), 4), ((2048, 2048), 32)])
def test_memory_does_not_grow_with_the_model(tmp_path, shape, count):
    x = np.full(shape, 0.5, BF16)  # 64 or 8 MiB each, 256 together.
    names = [f"layers.{i}.weight" for i in range(count)]
    specs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n in names}
    with _write.ShardWriter(str(tmp_path), {"model.safetensors": specs}) as writer:
        for name in names:
            writer.write(name, x)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        # Not on the eight devices of the tests, which have their share of memory.
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Python with JAX alone takes 170 to 178 MB.
    assert int(done.stdout) << 10 <= 3 * x.nbytes + 200e6


def test_a_disk_that_fails_while_it_runs_is_told_of(source, tmp_path, monkeypatch):
    flushed = threading.Event()

    def fsync(file: int) -> None:
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    def wait(_: int) -> None:
        assert flushed.wait(timeout=60)

    monkeypatch.setattr(_write, "_FLUSH_SECONDS", 0.001)
    monkeypatch.setattr(_write.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.quantize_checkpoint(source, tmp_path / "out", progress=wait)
    assert not (tmp_path / "out").exists()


def test_killed_for_good_it_goes_on_too(source, tmp_path):
    code = (
        "import os, sys\nfrom fp8jax import checkpoint\n"
        "left = 700_000\n"
        "def die(n):\n"
        "    global left\n"
        "    left -= n\n"
        "    if left < 0: os.kill(os.getpid(), 9)\n"
        "checkpoint.quantize_checkpoint(sys.argv[1], sys.argv[2], progress=die)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    checkpoint.quantize_checkpoint(source, tmp_path / "out")
    checkpoint.quantize_checkpoint(source, tmp_path / "b")
    differences = checkpoint.diff(tmp_path / "out", tmp_path / "b")
    assert {d.what for d in differences} == {"same bits"}
