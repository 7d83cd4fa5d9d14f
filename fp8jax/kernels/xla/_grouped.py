"""Products of groups of rows, and their quantization, in `jnp`."""

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import numerics
from fp8jax.kernels._contract import Directions
from fp8jax.kernels._grouped import rows_apart, rows_of
from fp8jax.kernels.xla._gemm import PROMOTION_INTERVAL, gemm, sum_of_chunks
from fp8jax.kernels.xla._quantize import quantize


def grouped_gemm(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    lhs_tile: numerics.Tile,
    rhs_tile: numerics.Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Rows of `lhs [m, k]` times their group's `rhs [g, n, k]`, transposed.

    `gemm` of at most 128 rows of one group at a time: `m + 128 g` rows of work at most,
    and no array larger than the result's. See `fp8jax.kernels.GroupedGemm`.
    """
    if lhs_tile[0] != 1:
        raise NotImplementedError(
            "xla grouped_gemm takes an lhs with scales of its own for every row, got "
            f"lhs_tile={lhs_tile}."
        )
    m, n = lhs.shape[0], rhs.shape[1]
    size = numerics.at_most(m, PROMOTION_INTERVAL)
    blocks = numerics.group_blocks(group_sizes, m, size)
    rows, present = rows_of(blocks, size)

    def multiply(block: tuple[jax.Array, ...]) -> jax.Array:
        lhs_rows, scale_rows, group = block
        return gemm(
            lhs_rows,
            scale_rows,
            jnp.take(rhs, group, axis=0, mode="clip"),
            jnp.take(rhs_scale, group, axis=0, mode="clip"),
            lhs_tile=lhs_tile,
            rhs_tile=rhs_tile,
            out_dtype=out_dtype,
        )

    gathered = (jnp.take(x, rows, axis=0, mode="clip") for x in (lhs, lhs_scale))
    products = lax.map(multiply, (*gathered, blocks.group))  # [blocks, size, n]
    out = jnp.zeros((m, n), out_dtype)
    return out.at[jnp.where(present, rows, m)].set(products, mode="drop")


def grouped_gemm_k(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    lhs_tile: numerics.Tile,
    rhs_tile: numerics.Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The product of each group's columns of `lhs [m, t]` and `rhs [n, t]`, [g, m, n].

    See `fp8jax.kernels.GroupedGemmK`.
    """
    if lhs_tile[0] > rhs_tile[0]:
        # One order of operands, one set of bits, as in `gemm`.
        return grouped_gemm_k(
            rhs,
            rhs_scale,
            lhs,
            lhs_scale,
            group_sizes,
            None if accumulate is None else accumulate.mT,
            lhs_tile=rhs_tile,
            rhs_tile=lhs_tile,
            out_dtype=out_dtype,
        ).mT
    chunks = -(-group_sizes.astype(jnp.int32) // jnp.int32(PROMOTION_INTERVAL))
    ends = jnp.cumsum(chunks, dtype=jnp.int32)

    def multiply(span: tuple[jax.Array, jax.Array]) -> jax.Array:
        tiles = lhs_tile, rhs_tile
        out = sum_of_chunks(lhs, lhs_scale, rhs, rhs_scale, *span, tiles)
        return out.astype(out_dtype)

    out = lax.map(multiply, (ends - chunks, ends))
    return out if accumulate is None else accumulate + out


def quantize_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    *,
    tile: numerics.Tile | None,
    tile_t: numerics.Tile,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> Directions:
    """`x [m, k]` quantized, and x.T with every group in columns of its own.

    See `fp8jax.kernels.QuantizeGrouped`.
    """
    if tile_t[1] != PROMOTION_INTERVAL:
        raise NotImplementedError(
            f"xla quantize_grouped takes tiles of {PROMOTION_INTERVAL} along the rows, "
            f"got tile_t={tile_t}."
        )
    apart = rows_apart(x, group_sizes, PROMOTION_INTERVAL)
    across = quantize(
        apart, tile=tile_t, dtype=dtype, scale=scale, eps=eps, transposed=True
    )
    if tile is None:
        return None, across
    return quantize(x, tile=tile, dtype=dtype, scale=scale, eps=eps), across
