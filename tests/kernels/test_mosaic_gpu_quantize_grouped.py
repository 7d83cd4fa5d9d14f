"""Rows in groups, quantized by the dense kernels: XLA's bits, whatever the sizes.

XLA's are checked against NumPy in `tests/matmul/test_grouped.py`.
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

SIZES = [
    (100, 0, 60, 1, 70),
    (300, 0, 0, 0, 0),
    (0, 0, 0, 0, 300),
    (1, 1, 1, 1, 1),
    (0, 0, 0, 0, 0),
    (128, 129, 0, 1, 42),
]
PAIRS = [
    ((1, 128), (1, 128)),
    (None, (1, 128)),
    ((1, 128), (128, 128)),
    ((128, 128), (1, 128)),
]
M = 300

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
each_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
hopper_only = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the kernels are for JAX 0.11 or newer; 0.10 transposes no 16 bits in Lane",
)
each_pair = pytest.mark.parametrize(("tile", "tile_t"), PAIRS)


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@functools.cache  # One function, compiled once for all that has its shape.
def _grouped(kernels, tile, tile_t, **options):
    options = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0, **options}
    return functools.partial(
        kernels.quantize_grouped, tile=tile, tile_t=tile_t, **options
    )


def _rows(shape, sizes, dtype=jnp.bfloat16) -> jax.Array:
    """NaN in rows of no group: they must not be seen in x.T's codes."""
    x = lognormal_tokens(np.random.default_rng(0), shape).astype(jnp.dtype(dtype))
    x[sum(sizes) :] = np.nan
    return jnp.asarray(x)


def _check(x, sizes, tile, tile_t, context=contextlib.nullcontext, **options) -> None:
    group_sizes = jnp.asarray(sizes, jnp.int32)
    with context():
        got = jax.jit(_grouped(mosaic_gpu, tile, tile_t, **options))(x, group_sizes)
        got = jax.tree.map(np.asarray, got)
    expected = on_cpu(_grouped(xla, tile, tile_t, **options), x, group_sizes)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    assert_same_bits(got, expected)


@interpreted
@each_sizes
def test_interpreted_is_xla_s(sizes):
    _check(_rows((M, 130), sizes), sizes, (1, 128), (1, 128), _interpreting)


@interpreted
@each_pair
def test_interpreted_in_every_tile(tile, tile_t):
    sizes = SIZES[0]
    x = _rows((M, 130), sizes, jnp.float32)
    _check(x, sizes, tile, tile_t, _interpreting, dtype=jnp.float8_e5m2, eps=1e-2)


@interpreted
def test_interpreted_under_vmap():
    sizes = jnp.asarray(SIZES[:2], jnp.int32)
    x = jnp.stack([_rows((M, 128), s) for s in SIZES[:2]])
    with _interpreting():
        mapped = jax.vmap(_grouped(mosaic_gpu, (1, 128), (1, 128)))(x, sizes)
    one = jax.jit(_grouped(xla, (1, 128), (1, 128)))
    for i in range(2):
        expected = one(x[i], sizes[i])
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), expected)


@hopper_only
@each_pair
@pytest.mark.parametrize(("dtype", "x64"), [("bfloat16", False), ("float32", True)])
def test_lowers_for_cuda(tile, tile_t, dtype, x64):
    with jax.enable_x64(x64):
        x, sizes = jnp.zeros((136, 130), dtype), jnp.zeros(3, jnp.int32)
        traced = jax.jit(_grouped(mosaic_gpu, tile, tile_t)).trace(x, sizes)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_refuses_what_it_cannot_do():
    x, sizes = jnp.zeros((8, 128)), jnp.zeros(3, jnp.int32)
    with pytest.raises(NotImplementedError, match=r"got tile_t=\(128, 1\)"):
        _grouped(mosaic_gpu, (1, 128), (128, 1))(x, sizes)
    with pytest.raises(NotImplementedError, match=r"_grouped takes .* got int32"):
        _grouped(mosaic_gpu, None, (1, 128))(x.astype(jnp.int32), sizes)
    with pytest.raises(NotImplementedError, match="dtype=float8_e4m3b11fnuz"):
        _grouped(mosaic_gpu, None, (1, 128), dtype=jnp.float8_e4m3b11fnuz)(x, sizes)


@pytest.mark.gpu
@each_sizes
@each_pair
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_is_xla_s(sizes, tile, tile_t, dtype):
    _check(_rows((M, 300), sizes, dtype), sizes, tile, tile_t)


@pytest.mark.gpu
def test_random_sizes_of_many_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(lognormal_tokens(rng, (4096, 1024))).astype(jnp.bfloat16)
    for _ in range(5):
        cuts = np.sort(rng.integers(0, len(x) + 1, 16))
        _check(x, np.diff(cuts, prepend=0), (1, 128), (1, 128))


@pytest.mark.gpu
def test_twenty_runs_give_the_same_bits():
    x = jax.random.normal(jax.random.key(0), (4104, 3072), jnp.bfloat16)
    sizes = jnp.asarray([1000, 0, 7, 2048, 300], jnp.int32)
    run = jax.jit(_grouped(mosaic_gpu, (1, 128), (1, 128)))
    assert_repeats(run, x, sizes)
