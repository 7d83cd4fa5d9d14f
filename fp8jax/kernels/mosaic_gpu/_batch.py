"""A batch of products in one launch: each entry is a group of the grouped kernels."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fp8jax.kernels._contract import Tile
from fp8jax.kernels.mosaic_gpu._common import mapped_under_vmap, zero_pad
from fp8jax.kernels.mosaic_gpu._config import CHUNK
from fp8jax.kernels.mosaic_gpu._grouped import multiply_columns, multiply_rows
from fp8jax.kernels.mosaic_gpu._operands import BLOCK, ROW


def in_one_launch(
    lhs_tile: Tile, rhs_tile: Tile, out_dtype: jax.typing.DTypeLike
) -> Callable[..., jax.Array | None]:
    """How `gemm` runs a batch of all of its operands: `fold` of `mapped_under_vmap`.

    Bit for bit `gemm` of each entry. Rows of an entry follow those of the one before as
    they lie; where both operands have scales of their own for each row, entries lie
    side by side along the contraction instead, which takes a copy of their codes.
    """

    def fold(
        lhs: jax.Array,
        lhs_scale: jax.Array,
        rhs: jax.Array,
        rhs_scale: jax.Array,
        *accumulate: jax.Array,
    ) -> jax.Array | None:
        (b, m, _), n = lhs.shape, rhs.shape[1]
        how = {"out_dtype": out_dtype}
        if (lhs_tile, rhs_tile) == (ROW, BLOCK) and not accumulate:
            run = mapped_under_vmap(functools.partial(multiply_rows, **how))
            rows = (x.reshape(b * m, -1) for x in (lhs, lhs_scale))
            sizes = jnp.full(b, m, jnp.int32)
            return run(*rows, rhs, rhs_scale, sizes).reshape(b, m, n)
        tiles = {"lhs_tile": lhs_tile, "rhs_tile": rhs_tile}
        run = mapped_under_vmap(functools.partial(multiply_columns, **tiles, **how))
        lhs, rhs = (zero_pad(x, (1, 1, CHUNK)) for x in (lhs, rhs))
        operands = map(_side_by_side, (lhs, lhs_scale, rhs, rhs_scale))
        sizes = jnp.full(b, lhs.shape[2], jnp.int32)
        return run(*operands, sizes, *accumulate)

    return fold


def _side_by_side(x: jax.Array) -> jax.Array:
    """`[b, rows, columns]` to `[rows, b columns]`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)
