"""SwiGLU and its gradient, fused with quantization: the oracle's numbers.

In interpret mode both compute in the same spelling with the same exponential, and the
bits are the same. On a GPU, exponential and root are one instruction each there: h is
off by up to (13 + 1.5 |gate|) 2^-24 (`mosaic_gpu._swiglu`), so one in 2^9 elements at
|gate| = 16 may round to another bfloat16, and one in 16 of those to another code.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.kernels.mosaic_gpu import _blocks
from fp8jax.testing import assert_codes_differ_by_last_bits, assert_same_bits
from tests.kernels.trust import assert_repeats, on_cpu

OPS = ("quantize_swiglu", "quantize_swiglu_gradient")
ROW, BOX = (1, 128), (128, 128)
DIRECTIONS = [(ROW, ROW), (ROW, None), (None, ROW), (BOX, BOX), (None, BOX)]

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
each_op = pytest.mark.parametrize("op", OPS)
each_direction = pytest.mark.parametrize(("tile", "tile_t"), DIRECTIONS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def _inputs(op: str, shape, dtype) -> list[jax.Array]:
    """(gate, up) or (dh, gate, up), with both of sigmoid's tails."""
    rng = np.random.default_rng(sum(shape))
    count = 2 if op == "quantize_swiglu" else 3
    arrays = rng.standard_normal((count, *shape), dtype=np.float32) * 4
    return [jnp.asarray(a.astype(jnp.dtype(dtype))) for a in arrays]


@functools.cache  # One function, compiled once for all that has its shape.
def _op(kernels, op: str, tile=ROW, tile_t=ROW, scale="pow2", dtype=jnp.float8_e4m3fn):
    return functools.partial(
        getattr(kernels, op),
        tile=tile,
        tile_t=tile_t,
        dtype=dtype,
        scale=scale,
        eps=0.0,
    )


def _pair(op: str, inputs, context=contextlib.nullcontext, **how):
    """What Mosaic gives and what XLA does, as NumPy arrays."""
    with context():
        got = jax.jit(_op(mosaic_gpu, op, **how))(*inputs)
        got = jax.tree.map(np.asarray, got)
    return got, on_cpu(_op(xla, op, **how), *inputs)


@interpreted
@each_op
@pytest.mark.parametrize(
    ("dtype", "tile", "tile_t"),
    [
        *(("bfloat16", *tiles) for tiles in DIRECTIONS),
        *((dtype, ROW, ROW) for dtype in ("float16", "float32")),
    ],
)
def test_interpreted_is_the_oracle(op, dtype, tile, tile_t):
    inputs = _inputs(op, (136, 130), dtype)
    how = {"tile": tile, "tile_t": tile_t}
    assert_same_bits(*_pair(op, inputs, _interpreting, **how))


@interpreted
@each_op
@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize("buffers", [1, 2])
def test_interpreted_warpgroups_share_a_block(op, buffers, warpgroups, monkeypatch):
    plain = _blocks.blocks_config

    def config(**problem):
        found = plain(**problem)
        return dataclasses.replace(found, buffers=buffers, warpgroups=warpgroups)

    monkeypatch.setattr(_blocks, "blocks_config", config)
    assert_same_bits(*_pair(op, _inputs(op, (136, 130), jnp.bfloat16), _interpreting))


@interpreted
@each_op
def test_interpreted_fp32_scales_and_e5m2(op):
    inputs = _inputs(op, (130, 200), jnp.bfloat16)
    got, expected = _pair(op, inputs, _interpreting, scale="fp32")
    assert_codes_differ_by_last_bits(got, expected)
    assert_same_bits(*_pair(op, inputs, _interpreting, dtype=jnp.float8_e5m2))


def _with_special_values(op: str) -> list[jax.Array]:
    inputs = [np.array(x) for x in _inputs(op, (256, 256), jnp.float32)]
    inputs[0][3, 5], inputs[0][200, 7] = np.nan, np.inf
    inputs[-1][130, 200] = -np.inf
    inputs[-2][10, 130] = -np.inf
    inputs[-1][:, 40:50] = 0
    inputs[-1][64:128, :128] = 1e-30
    inputs[-2][:, 250] = 1e4
    inputs[-2][:, 251] = -1e4
    return [jnp.asarray(x) for x in inputs]


@interpreted
@each_op
def test_interpreted_special_values(op):
    got, expected = _pair(op, _with_special_values(op), _interpreting)
    assert_codes_differ_by_last_bits(got, expected)
    data, scale = got[0][0]
    assert np.isnan(scale[3, 0])
    assert np.isnan(scale[10, 1])
    assert np.isnan(scale[130, 1])
    assert np.isfinite(scale[4:10]).all()
    assert np.isfinite(data[4:10].astype(np.float32)).all()


@interpreted
@each_op
@pytest.mark.parametrize("m", [128, 136])
def test_interpreted_under_vmap(op, m):
    _check_vmap(op, (2, m, 128), _interpreting)


def _check_vmap(op: str, shape, context) -> None:
    inputs = _inputs(op, shape, jnp.bfloat16)
    with context():
        mapped = jax.jit(jax.vmap(_op(mosaic_gpu, op)))(*inputs)
        mapped = jax.tree.map(np.asarray, mapped)
    inputs = [np.asarray(x) for x in inputs]  # JAX would compile each index.
    run = jax.jit(_op(xla, op))
    for i in range(shape[0]):
        one = run(*(x[i] for x in inputs))
        assert_codes_differ_by_last_bits(
            jax.tree.map(lambda a, i=i: a[i], mapped), jax.tree.map(np.asarray, one)
        )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="JAX 0.10, where no kernel runs, infers no layout for a block in place",
)
@each_op
@each_direction
@pytest.mark.parametrize(("dtype", "x64"), [("bfloat16", False), ("float32", True)])
def test_lowers_for_cuda(op, tile, tile_t, dtype, x64):
    with jax.enable_x64(x64):
        run = jax.jit(_op(mosaic_gpu, op, tile=tile, tile_t=tile_t))
        traced = run.trace(*_inputs(op, (136, 130), dtype))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_oracle_is_the_quantization_of_the_exact_values(dtype):
    """In float64, rounded to the dtype: only ties may fall either way."""
    dh, gate, up = _inputs(OPS[1], (128, 256), dtype)
    d, g, u = (np.asarray(x).astype(np.float64) for x in (dh, gate, up))
    sigmoid = 1 / (1 + np.exp(-g))
    exact = {
        "h": g * sigmoid * u,
        "dgate": d * u * sigmoid * (1 + g * (1 - sigmoid)),
        "dup": d * g * sigmoid,
    }
    (h,) = jax.jit(_op(xla, OPS[0]))(gate, up)
    dgate, dup = jax.jit(_op(xla, OPS[1]))(dh, gate, up)
    quantize = functools.partial(
        xla.quantize, tile=ROW, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
    )
    for value, got in zip(exact.values(), (h, dgate, dup), strict=True):
        rounded = jnp.asarray(value.astype(np.float32)).astype(dtype)
        expected = quantize(rounded), quantize(rounded, transposed=True)
        assert_codes_differ_by_last_bits(
            jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, expected)
        )


def test_refuses_what_it_cannot_do():
    gate, up = _inputs(OPS[0], (8, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"got tile_t=\(128, 1\)"):
        _op(mosaic_gpu, OPS[0], tile_t=(128, 1))(gate, up)
    with pytest.raises(NotImplementedError, match=r"swiglu takes .* got bfloat16, flo"):
        _op(mosaic_gpu, OPS[0])(gate, up.astype(jnp.float32))


@pytest.mark.gpu
@each_op
@each_direction
@each_dtype
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("shape", [(1, 1), (303, 300), (2000, 4096)])
def test_is_the_oracle_but_for_last_bits(shape, scale, op, tile, tile_t, dtype):
    how = {"tile": tile, "tile_t": tile_t, "scale": scale}
    assert_codes_differ_by_last_bits(*_pair(op, _inputs(op, shape, dtype), **how))


@pytest.mark.gpu
@each_op
def test_both_directions_hold_the_same_numbers(op):
    inputs = _inputs(op, (1032, 640), jnp.bfloat16)
    both = jax.jit(_op(mosaic_gpu, op))(*inputs)
    along = jax.jit(_op(mosaic_gpu, op, tile_t=None))(*inputs)
    across = jax.jit(_op(mosaic_gpu, op, tile=None))(*inputs)
    for value, first, second in zip(both, along, across, strict=True):
        assert_same_bits(value, (first[0], second[1]))


@pytest.mark.gpu
@each_op
def test_special_values(op):
    assert_codes_differ_by_last_bits(*_pair(op, _with_special_values(op)))


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("m", [128, 136])
def test_under_vmap(op, m):
    _check_vmap(op, (3, m, 256), contextlib.nullcontext)


@pytest.mark.gpu
@each_op
def test_twenty_runs_give_the_same_bits(op):
    inputs = _inputs(op, (4104, 3072), jnp.bfloat16)
    run = jax.jit(_op(mosaic_gpu, op))
    assert_repeats(run, *inputs)
