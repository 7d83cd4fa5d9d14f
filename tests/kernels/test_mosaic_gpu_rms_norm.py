"""RMS normalization fused with quantization: the oracle's numbers, one read of x.

The two sum squares in another order, so 1 / rms differs in its last bits, and h rounds
to another 16-bit number in about 2^-14 of elements.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.kernels.mosaic_gpu._rms_norm_config import PART, rms_norm_config
from fp8jax.testing import assert_codes_differ_by_last_bits, assert_same_bits
from tests.kernels.trust import assert_repeats, on_cpu

# One tile, ragged, several rows a step, an odd number of tiles, one row of 64 tiles
# and more, and of as many as there may be.
SHAPES = [(1, 1), (5, 130), (70, 512), (5, 2176), (3, 7168), (2, 9000), (3, 16384)]

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def _inputs(shape, dtype) -> tuple[jax.Array, jax.Array]:
    """Rows of different size, and a weight of both signs."""
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape, dtype=np.float32)
    x *= rng.lognormal(size=(shape[0], 1)).astype(np.float32)
    weight = rng.standard_normal(shape[1], dtype=np.float32)
    return jnp.asarray(x.astype(jnp.dtype(dtype))), jnp.asarray(weight)


@functools.cache  # One function, compiled once for all that has its shape.
def _op(kernels, scale="pow2", epsilon=1e-6):
    return functools.partial(
        kernels.quantize_rms_norm,
        epsilon=epsilon,
        tile=(1, 128),
        dtype=jnp.float8_e4m3fn,
        scale=scale,
        eps=0.0,
    )


def _check(x, weight, context=contextlib.nullcontext, **how):
    with context():
        got = jax.tree.map(np.asarray, jax.jit(_op(mosaic_gpu, **how))(x, weight))
    expected = on_cpu(_op(xla, **how), x, weight)
    _assert_close(got, expected, x.shape[1])
    return got


def _assert_close(got, expected, k: int) -> None:
    assert_codes_differ_by_last_bits(got[0], expected[0])
    # Both sum k squares in float32; a square root halves the relative error.
    np.testing.assert_allclose(got[1], expected[1], rtol=(k + 3) * 2.0**-24)


@interpreted
@each_shape
@each_dtype
def test_interpreted_is_the_oracle(shape, dtype):
    _check(*_inputs(shape, dtype), _interpreting)


@interpreted
def test_interpreted_fp32_scales():
    _check(*_inputs((5, 300), jnp.bfloat16), _interpreting, scale="fp32")


def _with_special_values() -> tuple[jax.Array, jax.Array]:
    x, weight = (np.array(a) for a in _inputs((32, 512), jnp.float32))
    x[3, 5], x[7, 200], x[8, 511] = np.nan, np.inf, -np.inf
    x[9] = 0
    x[10] = 1e-36  # Its square underflows.
    x[11, 0] = 1e30  # Its square overflows.
    x[12] *= 1e-15
    weight[128:256] = 0
    return jnp.asarray(x), jnp.asarray(weight)


def _check_special_values(context) -> None:
    for epsilon in (1e-6, 1e-30):
        got = _check(*_with_special_values(), context, epsilon=epsilon)
        scale = got[0][1]
        bad = np.isin(np.arange(32), [3, 7, 8, 11])
        np.testing.assert_array_equal(np.isnan(scale), np.tile(bad[:, None], (1, 4)))


@interpreted
def test_interpreted_special_values_spoil_their_row_alone():
    _check_special_values(_interpreting)


@interpreted
def test_interpreted_under_vmap():
    _check_vmap((2, 9, 256), _interpreting)


def _check_vmap(shape, context) -> None:
    b, m, k = shape
    x, weight = _inputs((b * m, k), jnp.bfloat16)
    x = np.asarray(x).reshape(shape)
    with context():
        mapped = jax.jit(jax.vmap(_op(mosaic_gpu), (0, None)))(x, weight)
        mapped = jax.device_get(mapped)
        run = jax.jit(_op(mosaic_gpu))
        one_by_one = [jax.device_get(run(e, weight)) for e in x]
    for i, one in enumerate(one_by_one):
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), one)


@each_shape
@pytest.mark.parametrize(("dtype", "x64"), [("bfloat16", False), ("float32", True)])
def test_lowers_for_cuda(shape, dtype, x64):
    with jax.enable_x64(x64):
        traced = jax.jit(_op(mosaic_gpu)).trace(*_inputs(shape, dtype))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_every_row_length_has_a_config_that_fits_or_none():
    for k in range(1, 16385):
        config = rms_norm_config(k)
        assert config is not None
        assert config.chunks * 128 >= k
        assert config.tiles % 8 == 0
        assert config.tiles <= config.parts * PART <= 128
    assert rms_norm_config(16385) is None


@each_dtype
def test_oracle_is_the_quantization_of_the_exact_values(dtype):
    x, weight = _inputs((64, 512), dtype)
    values = np.asarray(x).astype(np.float64)
    r = 1 / np.sqrt(np.mean(values**2, axis=1, keepdims=True) + 1e-6)
    h = jnp.asarray((values * r * np.asarray(weight)).astype(np.float32)).astype(dtype)
    exact = xla.quantize(
        h, tile=(1, 128), dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
    )
    expected = exact, r[:, 0].astype(np.float32)
    got = jax.jit(_op(xla))(x, weight)
    _assert_close(*(jax.tree.map(np.asarray, q) for q in (got, expected)), k=512)


def test_refuses_what_it_cannot_do():
    x, weight = jnp.ones((2, 16385), jnp.bfloat16), jnp.ones(16385)
    with pytest.raises(NotImplementedError, match=r"rows of up to 16384, got .*16385"):
        _op(mosaic_gpu)(x, weight)
    with pytest.raises(NotImplementedError, match=r"rms_norm takes .* got int32"):
        _op(mosaic_gpu)(x[:, :5].astype(jnp.int32), weight[:5])


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 4096), (1111, 1536)])
def test_is_the_oracle_but_for_last_bits(shape, scale, dtype):
    _check(*_inputs(shape, dtype), scale=scale)


@pytest.mark.gpu
def test_special_values_spoil_their_row_alone():
    _check_special_values(contextlib.nullcontext)


@pytest.mark.gpu
def test_under_vmap():
    _check_vmap((3, 65, 640), contextlib.nullcontext)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [512, 7168, 12288])
def test_rows_do_not_depend_on_each_other_nor_on_the_run(k):
    x, weight = _inputs((1000, k), jnp.bfloat16)
    run = jax.jit(_op(mosaic_gpu))
    first = assert_repeats(run, x, weight)
    few = run(np.asarray(x)[300:313], weight)
    assert_same_bits(few, jax.tree.map(lambda a: np.asarray(a)[300:313], first))


@functools.cache  # One function, compiled once for all that has its shape.
def _add(op):
    return functools.partial(mosaic_gpu.quantize_add_rms_norm, **op.keywords)


def _check_add(shape, dtype, context) -> None:
    """The sum, and the bits that the sum alone would give."""
    x, weight = map(np.asarray, _inputs(shape, dtype))
    residual = x[::-1] * np.asarray(3, x.dtype)
    with context():
        *found, total = jax.jit(_add(_op(mosaic_gpu)))(x, residual, weight)
        expected = jax.jit(_op(mosaic_gpu))(x + residual, weight)
    np.testing.assert_array_equal(total, x + residual)
    assert_same_bits(tuple(found), expected)


@interpreted
@pytest.mark.parametrize("shape", [(5, 130), (140, 512), (2, 9000)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_interpreted_sum_is_normalized(shape, dtype):
    _check_add(shape, dtype, _interpreting)


@interpreted
def test_sum_of_rows_too_long_for_one_launch_is_made_before():
    shapes = [jax.ShapeDtypeStruct((2, 16384), jnp.float32)] * 2
    weight = jax.ShapeDtypeStruct((16384,), jnp.float32)
    traced = jax.jit(_add(_op(mosaic_gpu))).trace(*shapes, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.add" in text
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.gpu
@each_shape
@each_dtype
def test_sum_is_normalized(shape, dtype):
    _check_add(shape, dtype, contextlib.nullcontext)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sum_of_many_rows_is_normalized(dtype):
    for _ in range(3):
        _check_add((3000, 4096), dtype, contextlib.nullcontext)
