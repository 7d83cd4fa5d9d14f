"""Rows in groups, moved apart: what every lowering quantizes along the rows."""

import jax
import jax.numpy as jnp

from fp8jax import numerics


def rows_of(blocks: numerics.GroupBlocks, size: int) -> tuple[jax.Array, jax.Array]:
    """The rows that the blocks' places stand for, and which of them are in use."""
    place = jnp.arange(size, dtype=jnp.int32)[None]
    return blocks.first[:, None] + place, place < blocks.rows[:, None]


def rows_apart(x: jax.Array, group_sizes: jax.Array, size: int) -> jax.Array:
    """`x [m, k]` with each group's rows from a multiple of `size` on.

    Args:
        x: `[m, k]`, the first group's rows first.
        group_sizes: int32 [g]; their sum is at most m.
        size: rows of a block.

    Returns:
        `[size * count_group_blocks(m, g, size), k]`; zero in rows of no group.
    """
    blocks = numerics.group_blocks(group_sizes, x.shape[0], size)
    rows, present = (i.reshape(-1) for i in rows_of(blocks, size))
    moved = jnp.take(x, rows, axis=0, mode="clip")
    return jnp.where(present[:, None], moved, jnp.zeros((), x.dtype))
