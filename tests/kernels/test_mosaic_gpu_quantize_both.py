"""Both directions from one read: the two single quantizations, bit for bit.

Those are checked against NumPy in `test_mosaic_gpu_quantize.py`; here they are the
reference, by XLA, whose codes are the same for power-of-two scales.
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
from fp8jax.testing import assert_same_bits, lognormal_tokens
from tests.kernels.trust import assert_repeats, on_cpu

PAIRS = [
    ((1, 128), (1, 128)),
    ((128, 128), (128, 128)),
    ((1, 128), (128, 128)),
    ((128, 128), (1, 128)),
]

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
hopper_only = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the kernels are for JAX 0.11 or newer; 0.10 transposes no 16 bits in Lane",
)
each_pair = pytest.mark.parametrize(("tile", "tile_t"), PAIRS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@functools.cache  # One function, compiled once for all that has its shape.
def _both(kernels, tile, tile_t, scale="pow2", dtype=jnp.float8_e4m3fn, eps=0.0):
    return functools.partial(
        kernels.quantize_both,
        tile=tile,
        tile_t=tile_t,
        dtype=dtype,
        scale=scale,
        eps=eps,
    )


def _lognormal(shape, dtype) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(lognormal_tokens(rng, shape).astype(jnp.dtype(dtype)))


def _check(x, tile, tile_t, context=contextlib.nullcontext, **options) -> None:
    x = jnp.asarray(x)
    with context():
        got = jax.jit(_both(mosaic_gpu, tile, tile_t, **options))(x)
        got = jax.tree.map(np.asarray, got)
    expected = on_cpu(_both(xla, tile, tile_t, **options), x)
    _check_equal(got, expected, exact=options.get("scale", "pow2") == "pow2")


def _check_equal(got, expected, exact) -> None:
    for (data, scale), (codes, factor) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(scale, factor)
        nan = np.isnan(np.asarray(codes).astype(np.float32))
        np.testing.assert_array_equal(np.isnan(data.astype(np.float32)), nan)
        steps = np.abs(data.view("i1").astype(int) - np.asarray(codes).view("i1"))
        steps = np.where(nan, 0, steps)
        # Division is IEEE on no two backends alike: a step at ties.
        assert steps.max() <= (0 if exact else 1)
        assert (steps != 0).mean() <= 1e-3


@interpreted
@each_pair
@each_dtype
def test_interpreted_is_the_two_single_ones(tile, tile_t, dtype):
    _check(_lognormal((136, 130), dtype), tile, tile_t, _interpreting)


@interpreted
@each_pair
def test_interpreted_fp32_scales(tile, tile_t):
    x = _lognormal((130, 200), jnp.bfloat16)
    _check(x, tile, tile_t, _interpreting, scale="fp32")


@interpreted
@each_pair
def test_interpreted_special_values(tile, tile_t):
    x = np.array(_lognormal((130, 384), jnp.float32))
    x[3, 5], x[7, 200], x[128, 383] = np.nan, np.inf, -np.inf
    x[:128, 128:256] = 0
    _check(x, tile, tile_t, _interpreting)
    _check(np.zeros((1, 1), np.float32), tile, tile_t, _interpreting)


@interpreted
def test_interpreted_e5m2_and_eps():
    x = _lognormal((8, 128), jnp.bfloat16)
    options = {"dtype": jnp.float8_e5m2, "eps": 1e3}
    _check(x, (1, 128), (1, 128), _interpreting, **options)


@interpreted
@each_pair
@pytest.mark.parametrize("m", [128, 136])
def test_interpreted_under_vmap(m, tile, tile_t):
    _check_vmap(tile, tile_t, (2, m, 128), _interpreting)


@interpreted
@each_pair
@pytest.mark.parametrize("shape", [(2, 256, 130), (3, 128, 256)])
def test_interpreted_matrices_stacked_twice(shape, tile, tile_t):
    x = _lognormal((2 * shape[0] * shape[1], shape[2]), jnp.bfloat16)
    x = x.reshape(2, *shape)
    with _interpreting():
        mapped = jax.vmap(jax.vmap(_both(mosaic_gpu, tile, tile_t)))(x)
        mapped = jax.device_get(mapped)
    one = jax.jit(_both(xla, tile, tile_t))
    for i in np.ndindex(2, shape[0]):
        expected = jax.device_get(one(x[i]))
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), expected)


@hopper_only
def test_transposed_codes_of_a_stack_are_written_where_they_belong():
    """As the GEMMs of experts read them: no transposition of a byte a weight."""
    x = jnp.zeros((4, 256, 384), jnp.bfloat16)
    run = jax.jit(jax.vmap(_both(mosaic_gpu, (128, 128), (128, 128))))
    program = run.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "4x384x256xf8E4M3FN" in program
    assert "stablehlo.transpose" not in program


def _check_vmap(tile, tile_t, shape, context) -> None:
    b, m, k = shape
    x = np.asarray(_lognormal((b * m, k), jnp.bfloat16)).reshape(shape)
    with context():
        mapped = jax.device_get(jax.jit(jax.vmap(_both(mosaic_gpu, tile, tile_t)))(x))
    one = _both(xla, tile, tile_t)
    for i in range(b):
        expected = on_cpu(one, x[i])
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), expected)


@hopper_only
@each_pair
@pytest.mark.parametrize(("dtype", "x64"), [("bfloat16", False), ("float32", True)])
def test_lowers_for_cuda(tile, tile_t, dtype, x64):
    with jax.enable_x64(x64):
        x = jnp.zeros((136, 130), dtype)
        traced = jax.jit(_both(mosaic_gpu, tile, tile_t)).trace(x)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@each_pair
def test_the_second_codes_of_equal_blocks_are_the_transpose(tile, tile_t):
    x = _lognormal((303, 576), jnp.bfloat16)
    first, second = _both(xla, tile, tile_t)(x)
    if tile == tile_t == (128, 128):
        assert_same_bits(second, tuple(a.T for a in first))
    plain = functools.partial(
        xla.quantize, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
    )
    assert_same_bits(first, plain(x, tile=tile))
    assert_same_bits(second, plain(x.T, tile=tile_t))


def test_refuses_what_it_cannot_do():
    x = jnp.zeros((8, 128))
    with pytest.raises(NotImplementedError, match=r"got tile_t=\(128, 1\)"):
        _both(mosaic_gpu, (1, 128), (128, 1))(x)
    with pytest.raises(NotImplementedError, match=r"_both takes .* got int32"):
        _both(mosaic_gpu, (1, 128), (1, 128))(x.astype(jnp.int32))
    with pytest.raises(NotImplementedError, match="dtype=float8_e4m3b11fnuz"):
        _both(mosaic_gpu, (1, 128), (1, 128), dtype=jnp.float8_e4m3b11fnuz)(x)


@pytest.mark.gpu
@each_pair
@each_dtype
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("shape", [(1, 1), (303, 300), (1032, 640), (2000, 4096)])
def test_is_the_two_single_ones(shape, scale, tile, tile_t, dtype):
    _check(_lognormal(shape, dtype), tile, tile_t, scale=scale)


@pytest.mark.gpu
@each_pair
def test_one_bad_element_spoils_its_tiles_alone(tile, tile_t):
    clean = np.array(_lognormal((384, 384), jnp.float32))
    for row, column, bad in ((0, 0, np.nan), (200, 383, np.inf), (383, 255, -np.inf)):
        x = clean.copy()
        x[row, column] = bad
        _check(x, tile, tile_t)


@pytest.mark.gpu
@each_pair
def test_under_vmap(tile, tile_t):
    _check_vmap(tile, tile_t, (3, 136, 256), contextlib.nullcontext)
    _check_vmap(tile, tile_t, (3, 256, 128), contextlib.nullcontext)
    _check_vmap(tile, tile_t, (5, 384, 300), contextlib.nullcontext)


@pytest.mark.gpu
@each_pair
def test_twenty_runs_give_the_same_bits(tile, tile_t):
    x = jax.random.normal(jax.random.key(0), (4104, 3072), jnp.bfloat16)
    run = jax.jit(_both(mosaic_gpu, tile, tile_t))
    assert_repeats(run, x)
