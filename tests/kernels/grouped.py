"""Operands of groups, and each group's product checked by itself.

As in `test_mosaic_gpu_gemm.py`, codes are small integers with a scale of its own for
every tile. Each group is compared with float64, and with the dense kernel's bits.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import numerics
from fp8jax.kernels import mosaic_gpu
from fp8jax.testing import assert_same_bits, distinct_scales
from tests.kernels.trust import assert_promoted_sum, small_codes

ROW, BLOCK = (1, 128), (128, 128)
# Of wgrad's lhs and rhs.
KINDS = {"1d1d": (ROW, ROW), "2d1d": (BLOCK, ROW), "1d2d": (ROW, BLOCK)}
each_kind = pytest.mark.parametrize("kind", KINDS)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)
ON_GPU = contextlib.nullcontext


def interpreting():
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def scales(rng, shape, tile):
    shape = numerics.scale_shape(shape, tile)
    return jnp.asarray(distinct_scales(rng, shape))


def int32(sizes):
    return jnp.asarray(sizes, jnp.int32)


def with_nan(x: np.ndarray, where) -> np.ndarray:
    x = x.copy()
    x[where] = np.nan
    return x


def row_slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(int(e - s), int(e)) for e, s in zip(ends, sizes, strict=True)]


def row_operands(groups, m, n, k, dtype=jnp.float8_e4m3fn):
    rng = np.random.default_rng(m + 31 * n + k + groups)
    lhs = small_codes(rng, (m, k), dtype), scales(rng, (m, k), ROW)
    rhs = small_codes(rng, (groups, n, k), dtype), scales(rng, (groups, n, k), BLOCK)
    return *lhs, *rhs


@functools.cache  # One function, which is compiled once for all sizes.
def by_rows(out_dtype=jnp.float32):
    return functools.partial(
        mosaic_gpu.grouped_gemm, lhs_tile=ROW, rhs_tile=BLOCK, out_dtype=out_dtype
    )


@functools.cache
def dense(lhs_tile, rhs_tile, out_dtype):
    run = functools.partial(mosaic_gpu.gemm, lhs_tile=lhs_tile, rhs_tile=rhs_tile)
    return jax.jit(functools.partial(run, out_dtype=out_dtype))


def check_rows(
    sizes, m, n, k, context, out_dtype=jnp.float32, run=None, dtype=jnp.float8_e4m3fn
):
    # NumPy's: JAX would compile every slice.
    operands = map(np.array, row_operands(len(sizes), m, n, k, dtype))
    lhs, lhs_scale, rhs, rhs_scale = operands
    used = sum(sizes)
    # Of no group: whatever lies there, nothing comes of it.
    lhs_scale[used:] = np.nan
    lhs[used:] = np.nan
    run = jax.jit(by_rows(out_dtype) if run is None else run)
    by_group = dense(ROW, BLOCK, out_dtype)
    with context():
        out = np.asarray(run(lhs, lhs_scale, rhs, rhs_scale, int32(sizes)))
        assert out.shape == (m, n)
        assert out.dtype == out_dtype
        assert not out[used:].any()
        for i, rows in enumerate(row_slices(sizes)):
            if not sizes[i]:
                continue
            # A row of the dense product depends on no other: one shape to compile.
            product = np.asarray(by_group(lhs, lhs_scale, rhs[i], rhs_scale[i]))
            assert_same_bits(out[rows], product[rows])
            own = lhs[rows], lhs_scale[rows], rhs[i], rhs_scale[i]
            assert_promoted_sum(out[rows], *own, lhs_tile=ROW, rhs_tile=BLOCK)


def chunk_slices(sizes):
    """The chunks of 128 columns that are each group's."""
    chunks = [-(-s // 128) for s in sizes]
    ends = np.cumsum(chunks)
    return [slice(int(e - c), int(e)) for e, c in zip(ends, chunks, strict=True)]


def columns_of(chunks):
    return slice(128 * chunks.start, 128 * chunks.stop)


def column_operands(kind, sizes, rows, m, n, dtype=jnp.float8_e4m3fn):
    """As `quantize_grouped` lays them out, for `rows` rows in all."""
    rng = np.random.default_rng(m + 31 * n + rows + len(sizes))
    chunks = numerics.count_group_blocks(rows, len(sizes), 128)
    in_use = np.zeros(128 * chunks, bool)
    for span, size in zip(chunk_slices(sizes), sizes, strict=True):
        in_use[128 * span.start :][:size] = True
    empty = ~in_use.reshape(chunks, 128).any(axis=1)
    operands = []
    for side, tile in zip((m, n), KINDS[kind], strict=True):
        codes = np.array(small_codes(rng, (side, 128 * chunks), dtype))
        codes[:, ~in_use] = 0
        scale = np.array(scales(rng, (side, 128 * chunks), tile))
        scale[:, empty] = 1
        operands += map(jnp.asarray, (codes, scale))
    return tuple(operands)


@functools.cache
def by_columns(kind, out_dtype=jnp.float32):
    lhs_tile, rhs_tile = KINDS[kind]
    return functools.partial(
        mosaic_gpu.grouped_gemm_k,
        lhs_tile=lhs_tile,
        rhs_tile=rhs_tile,
        out_dtype=out_dtype,
    )


def check_columns(
    kind, sizes, m, n, context, out_dtype=jnp.float32, *, spare=0, dtype=None
):
    rows = sum(sizes) + spare
    dtype = jnp.float8_e4m3fn if dtype is None else dtype
    made = column_operands(kind, sizes, rows, m, n, dtype)
    operands = [np.asarray(x) for x in made]  # As in `check_rows`.
    lhs_tile, rhs_tile = KINDS[kind]
    by_group = dense(lhs_tile, rhs_tile, out_dtype)
    with context():
        run = jax.jit(by_columns(kind, out_dtype))
        out = np.asarray(run(*operands, int32(sizes)))
        assert out.shape == (len(sizes), m, n)
        assert out.dtype == out_dtype
        for i, chunks in enumerate(chunk_slices(sizes)):
            if not sizes[i]:
                assert not out[i].any()
                continue
            spans = (columns_of(chunks), chunks) * 2
            own = [x[:, s] for x, s in zip(operands, spans, strict=True)]
            assert_same_bits(out[i], np.asarray(by_group(*own)))
            assert_promoted_sum(out[i], *own, lhs_tile=lhs_tile, rhs_tile=rhs_tile)
