"""The Mosaic GPU quantization: its real code in interpret mode, and on a GPU.

The reference is NumPy's (`fp8jax.testing`), which divides and rounds as IEEE 754 says.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels import mosaic_gpu
from fp8jax.testing import (
    ALL_BF16,
    assert_same_bits,
    lognormal_tokens,
    quantize_numpy,
)
from tests.kernels.trust import assert_repeats

_TILES = ((1, 128), (128, 1), (128, 128))
_SMALLEST_NORMAL = np.float32(2.0**-126)

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
each_tile = pytest.mark.parametrize("tile", _TILES, ids=lambda t: f"{t[0]}x{t[1]}")
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
each_scale = pytest.mark.parametrize("scale", ["pow2", "fp32"])


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@functools.cache  # One function, compiled once for all that has its shape.
def _jitted(tile, scale="pow2", dtype=jnp.float8_e4m3fn, eps=0.0):
    return jax.jit(
        functools.partial(
            mosaic_gpu.quantize, tile=tile, dtype=dtype, scale=scale, eps=eps
        )
    )


def _quantize(x, tile, scale="pow2", dtype=jnp.float8_e4m3fn, eps=0.0, context=None):
    run = _jitted(tile, scale, dtype, eps)
    with (context or contextlib.nullcontext)():
        data, scales = run(jnp.asarray(x))
        return np.asarray(data), np.asarray(scales)


def _reference(x, tile, scale="pow2", dtype=jnp.float8_e4m3fn, eps=0.0):
    """Codes and scales by the definition, and the tiles whose amax is a subnormal."""
    x = np.asarray(x)
    codes, scales = quantize_numpy(x, tile, dtype=dtype, pow2=scale == "pow2", eps=eps)
    (m, k), (tm, tk) = x.shape, tile
    padded = np.pad(np.abs(x.astype(np.float32)), ((0, -m % tm), (0, -k % tk)))
    amax = padded.reshape(scales.shape[0], tm, scales.shape[1], tk).max((1, 3))
    return codes, scales, (amax > 0) & (amax < _SMALLEST_NORMAL)


def _expand(per_tile: np.ndarray, tile, shape) -> np.ndarray:
    rows = np.repeat(per_tile, tile[0], axis=0)[: shape[0]]
    return np.repeat(rows, tile[1], axis=1)[:, : shape[1]]


def _check_pow2(x, tile, dtype=jnp.float8_e4m3fn, eps=0.0, context=None) -> None:
    """The same bits as the reference's; NaN for NaN."""
    data, scales = _quantize(x, tile, "pow2", dtype, eps, context)
    codes, expected, subnormal = _reference(x, tile, "pow2", dtype, eps)
    assert data.shape == codes.shape
    assert scales.shape == expected.shape
    # A tile of float32 subnormals may count as zero.
    zeroed = subnormal & (scales == 1)
    np.testing.assert_array_equal(scales, np.where(zeroed, 1, expected))
    skip = _expand(subnormal, tile, data.shape)
    nan = np.isnan(codes.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(data.astype(np.float32)) & ~skip, nan)
    same = data.view(np.uint8) == codes.view(np.uint8)
    assert (same | nan | skip).all()


def _lognormal(shape: tuple[int, int], dtype) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(lognormal_tokens(rng, shape).astype(jnp.dtype(dtype)))


def _every_bf16() -> np.ndarray:
    """All 65,536 patterns in 512 rows of 128 neighbours, so scales differ by row."""
    return ALL_BF16.reshape(512, 128)


def _bf16_beside_448() -> np.ndarray:
    """Every finite bfloat16 up to 448 in a tile whose scale is 1."""
    x = _every_bf16().astype(np.float32)
    x = np.where(np.abs(x) <= 448, x, 0)
    x[:, 0] = 448
    return x.astype(jnp.bfloat16)


@interpreted
@each_tile
@each_dtype
def test_interpreted_pow2_is_the_reference(tile, dtype):
    _check_pow2(_lognormal((136, 130), dtype), tile, context=_interpreting)


@interpreted
@each_tile
def test_interpreted_fp32_is_the_reference(tile):
    x = _lognormal((130, 200), jnp.bfloat16)
    _check_fp32(x, tile, context=_interpreting)


@interpreted
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
def test_interpreted_special_values(tile):
    x = np.array(_lognormal((16, 384), jnp.float32))
    x[3, 5], x[7, 200], x[8, 383] = np.nan, np.inf, -np.inf
    x[9, :128] = 0
    _check_pow2(x, tile, context=_interpreting)
    _check_pow2(np.zeros((8, 128), np.float32), tile, context=_interpreting)


def _check_transposed(x, tile, context) -> None:
    def run(x, **options):
        quantize = functools.partial(mosaic_gpu.quantize, tile=tile, **options)
        return quantize(x, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0)

    with context():
        got = run(x, transposed=True)
        assert_same_bits(got, run(x.T))


@interpreted
@each_tile
def test_interpreted_transposed(tile):
    _check_transposed(_lognormal((136, 130), jnp.bfloat16), tile, _interpreting)


@pytest.mark.gpu
@each_tile
def test_transposed(tile):
    x = _lognormal((1032, 640), jnp.bfloat16)
    _check_transposed(x, tile, contextlib.nullcontext)


@interpreted
def test_interpreted_e5m2_and_eps():
    x = _lognormal((8, 128), jnp.bfloat16)
    _check_pow2(x, (1, 128), jnp.float8_e5m2, context=_interpreting)
    _check_pow2(x, (1, 128), eps=1e3, context=_interpreting)


@interpreted
@each_tile
def test_lowers_with_64_bit_types_enabled(tile):
    # Not by interpret mode, whose own callbacks may fail with 64-bit types.
    quantize = functools.partial(
        mosaic_gpu.quantize, tile=tile, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
    )
    with jax.enable_x64(True):
        traced = jax.jit(quantize).trace(_lognormal((136, 130), jnp.float32))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@each_tile
def test_with_64_bit_types_enabled(tile):
    x = _lognormal((300, 260), jnp.float32)
    with jax.enable_x64(True):
        _check_pow2(x, tile)


@interpreted
@each_tile
def test_interpreted_under_vmap_and_scan(tile):
    _check_vmap_and_scan(tile, (2, 136, 128), context=_interpreting)


def test_refuses_what_it_cannot_do():
    x = jnp.zeros((8, 128))
    with pytest.raises(NotImplementedError, match=r"got tile=\(1, 64\)"):
        _quantize(x, (1, 64))
    with pytest.raises(NotImplementedError, match="got int32"):
        _quantize(x.astype(jnp.int32), (1, 128))
    with pytest.raises(NotImplementedError, match="dtype=float8_e4m3b11fnuz"):
        _quantize(x, (1, 128), dtype=jnp.float8_e4m3b11fnuz)


def _check_fp32(x, tile, context=None) -> None:
    """The reference's scales; codes off by a step at ties, in 1 of 1000 elements."""
    data, scales = _quantize(x, tile, "fp32", context=context)
    codes, expected, _ = _reference(x, tile, "fp32")
    np.testing.assert_array_equal(scales, expected)
    # Codes of one sign are ordered as their bit patterns are.
    steps = np.abs(data.view(np.uint8).astype(int) - codes.view(np.uint8).astype(int))
    assert steps.max() <= 1
    assert (steps != 0).mean() <= 1e-3


def _check_vmap_and_scan(tile, shape, context) -> None:
    quantize = functools.partial(
        mosaic_gpu.quantize,
        tile=tile,
        dtype=jnp.float8_e4m3fn,
        scale="pow2",
        eps=0.0,
    )
    b, m, k = shape
    x = np.asarray(_lognormal((b * m, k), jnp.bfloat16)).reshape(shape)
    with context():
        one_by_one = [jax.device_get(jax.jit(quantize)(entry)) for entry in x]
        mapped = jax.device_get(jax.jit(jax.vmap(quantize))(x))
        _, scanned = lax.scan(lambda c, e: (c, quantize(e)), jnp.float32(0), x)
    for out in (mapped, jax.device_get(scanned)):
        for i, expected in enumerate(one_by_one):
            for got, want in zip(out, expected, strict=True):
                assert (got[i] == want).all()


@pytest.mark.gpu
@each_tile
@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1), (303, 300), (576, 512), (1032, 640), (2000, 4096)]
)
def test_pow2_is_the_reference(shape, tile, dtype):
    _check_pow2(_lognormal(shape, dtype), tile)


@pytest.mark.gpu
@each_tile
@each_dtype
def test_fp32_is_the_reference(tile, dtype):
    _check_fp32(_lognormal((1032, 640), dtype), tile)


@pytest.mark.gpu
@each_tile
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("patterns", [_every_bf16, _bf16_beside_448])
def test_every_bf16_pattern(patterns, tile, dtype):
    x = patterns()
    _check_pow2(x.T if tile == (128, 1) else x, tile, dtype)


@pytest.mark.gpu
@each_tile
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_spoils_its_tile_alone(bad, tile):
    x = np.array(_lognormal((384, 384), jnp.float32))
    clean, clean_scale = _quantize(x, tile)
    for row, column in ((0, 0), (127, 128), (200, 383), (383, 255)):
        y = x.copy()
        y[row, column] = bad
        data, scales = _quantize(y, tile)
        hit = np.zeros(scales.shape, bool)
        hit[row // tile[0], column // tile[1]] = True
        assert np.isnan(scales[hit]).all()
        np.testing.assert_array_equal(scales[~hit], clean_scale[~hit])
        elsewhere = ~_expand(hit, tile, x.shape)
        np.testing.assert_array_equal(
            data.view(np.uint8)[elsewhere], clean.view(np.uint8)[elsewhere]
        )


@pytest.mark.gpu
@each_tile
@each_scale
def test_zeros_have_scale_one(tile, scale):
    data, scales = _quantize(np.zeros((136, 256), np.float32), tile, scale)
    assert (scales == 1).all()
    assert not data.view(np.uint8).any()


@pytest.mark.gpu
@each_tile
def test_eps_is_a_floor_of_amax(tile):
    _check_pow2(_lognormal((256, 256), jnp.bfloat16), tile, eps=1.0)


@pytest.mark.gpu
@each_tile
def test_tiny_values_keep_their_relative_precision(tile):
    # Gradients of 1e-30 quantize as well as those of 1: no floor hides in the scale.
    x = np.asarray(_lognormal((256, 256), jnp.float32))
    _check_pow2(x * np.float32(2.0**-100), tile)


@pytest.mark.gpu
@each_tile
def test_under_vmap_and_scan(tile):
    _check_vmap_and_scan(tile, (3, 136, 256), contextlib.nullcontext)
    _check_vmap_and_scan(tile, (3, 256, 128), contextlib.nullcontext)


@pytest.mark.gpu
@each_tile
def test_twenty_runs_give_the_same_bits(tile):
    x = jax.random.normal(jax.random.key(0), (4104, 3072), jnp.bfloat16)
    assert_repeats(_jitted(tile), x)
