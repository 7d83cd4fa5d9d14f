"""The FP8 matrix product in `jnp`, promoted into FP32 every 128 of the contraction."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import _compat, numerics

PROMOTION_INTERVAL = 128


def gemm(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    lhs_tile: numerics.Tile,
    rhs_tile: numerics.Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    r"""`lhs [m, k]` times `rhs [n, k]` transposed, in chunks of 128 of k.

    $$out_{ij} = \sum_c s^l_{ic} s^r_{jc} \sum_{k \in c} l_{ik} r_{jk}$$

    The sum over chunks runs in order of k in float32, one fused pass a chunk; no array
    larger than the output is made. See `fp8jax.kernels.Gemm`.
    """
    for name, tile in (("lhs", lhs_tile), ("rhs", rhs_tile)):
        if tile[1] != PROMOTION_INTERVAL:
            raise NotImplementedError(
                f"xla gemm takes tiles of {PROMOTION_INTERVAL} along the contraction, "
                f"got {name}_tile={tile}."
            )
    if lhs_tile[0] > rhs_tile[0]:
        # One order of operands, one set of bits: XLA may sum the other one otherwise.
        return gemm(
            rhs,
            rhs_scale,
            lhs,
            lhs_scale,
            None if accumulate is None else accumulate.T,
            lhs_tile=rhs_tile,
            rhs_tile=lhs_tile,
            out_dtype=out_dtype,
        ).T
    chunks = -(-lhs.shape[1] // PROMOTION_INTERVAL)
    tiles = lhs_tile, rhs_tile
    out = sum_of_chunks(lhs, lhs_scale, rhs, rhs_scale, 0, chunks, tiles)
    out = out.astype(out_dtype)
    return out if accumulate is None else accumulate + out


def sum_of_chunks(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    first: jax.Array | int,
    end: jax.Array | int,
    tiles: tuple[numerics.Tile, numerics.Tile],
) -> jax.Array:
    """The product's share of the chunks of k from `first` up to `end`, float32 [m, n].

    Operands, scales and the tiles of lhs and rhs are those of `gemm`.
    """
    (m, k), n = lhs.shape, rhs.shape[0]
    # Not `-k % PROMOTION_INTERVAL`: of a symbolic k JAX would not know the sum's size.
    edge = (k + PROMOTION_INTERVAL - 1) // PROMOTION_INTERVAL * PROMOTION_INTERVAL - k
    lhs, rhs = (jnp.pad(x, ((0, 0), (0, edge))) for x in (lhs, rhs))

    def promote(chunk: jax.Array, acc: jax.Array) -> jax.Array:
        l_codes = _columns(lhs, chunk * PROMOTION_INTERVAL, PROMOTION_INTERVAL)
        r_codes = _columns(rhs, chunk * PROMOTION_INTERVAL, PROMOTION_INTERVAL)
        partial = _code_product(l_codes, r_codes)
        l_scale = _columns(lhs_scale, chunk, 1)[:, 0]
        r_scale = _columns(rhs_scale, chunk, 1)[:, 0]
        l_scale = numerics.expand_scale(l_scale, m, tiles[0][0])
        r_scale = numerics.expand_scale(r_scale, n, tiles[1][0])
        return acc + partial * (l_scale[:, None] * r_scale[None, :])

    axes = _compat.union_of_varying_axes(lhs, lhs_scale, rhs, rhs_scale)
    acc = _compat.varying_over(jnp.zeros((m, n), jnp.float32), axes)
    return lax.fori_loop(first, end, promote, acc)


def _columns(x: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _code_product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Products of FP8 codes summed in float32: `[m, c]` and `[n, c]` to `[m, n]`."""
    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=_cpu_dot_nt,
        # Every FP8 code is a bfloat16, and matrix units multiply those exactly.
        default=functools.partial(_dot_nt, dtype=jnp.bfloat16),
    )


def _cpu_dot_nt(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    # XLA:CPU sums a product with a vector in another order: a row alone would have
    # other bits than among others. So a vector is two, and what may be one has a row
    # more.
    (m, _), (n, _) = lhs.shape, rhs.shape
    lhs, rhs = (
        jnp.pad(x, ((0, 1), (0, 0))) if numerics.may_be_one(x.shape[0]) else x
        for x in (lhs, rhs)
    )
    return _dot_nt(lhs, rhs, dtype=jnp.float32)[:m, :n]


def _dot_nt(
    lhs: jax.Array, rhs: jax.Array, *, dtype: jax.typing.DTypeLike
) -> jax.Array:
    return lax.dot_general(
        lhs.astype(dtype),
        rhs.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
