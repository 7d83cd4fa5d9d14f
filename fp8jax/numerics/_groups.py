"""Rows in groups, one group after the other, in blocks that hold rows of one group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.numerics._sides import at_most


class GroupBlocks(NamedTuple):
    """Which rows each block holds; int32 [blocks] each.

    Attributes:
        group: the group that the rows are of; the number of groups where a block holds
            none.
        first: the first row.
        rows: how many rows; fewer than a block's size at a group's end, 0 after the
            last group's.
    """

    group: jax.Array
    first: jax.Array
    rows: jax.Array


def count_group_blocks(rows: int, groups: int, size: int) -> int:
    """The most blocks of `size` rows that any sizes of the groups need.

    Args:
        rows: of all groups together, at most.
        groups: how many there are.
        size: rows of a block.

    Returns:
        `p + (rows - p) // size` with `p = min(groups, rows)`: p groups have a block,
        and whatever the rest of the rows fill. Groups of one row, but for the last,
        need as many. Of a symbolic number of rows p is `groups`: never fewer blocks.
    """
    begun = at_most(rows, groups)
    return begun + (rows - begun) // size


def group_blocks(group_sizes: jax.Array, rows: int, size: int) -> GroupBlocks:
    """The blocks of `size` rows: each group's begin at its first row.

    Args:
        group_sizes: int32 [groups], any of them 0; their sum is at most `rows`.
        rows: of all groups together, at most.
        size: rows of a block.

    Returns:
        `count_group_blocks(rows, groups, size)` blocks. Group i's begin at block
        `sum(ceil(group_sizes[:i] / size))`.
    """
    sizes = group_sizes.astype(jnp.int32)
    needed = -(-sizes // jnp.int32(size))
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    count = count_group_blocks(rows, len(sizes), size)
    index = jnp.arange(count, dtype=jnp.int32)
    # NOTE: JAX 0.12's searchsorted fails in a shard_map over some axes of the mesh.
    group = (ends[None] <= index[:, None]).sum(axis=1, dtype=jnp.int32)

    def of_group(values: jax.Array) -> jax.Array:
        return jnp.append(values, jnp.int32(0))[group]  # 0 for no group.

    within = (index - of_group(ends - needed)) * jnp.int32(size)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    here = jnp.clip(of_group(sizes) - within, 0, size)
    first = jnp.where(here > 0, of_group(starts) + within, 0)
    return GroupBlocks(group, first, here)


def check_group_sizes(name: str, group_sizes: jax.Array) -> None:
    """Raises ValueError, on behalf of the function `name`, if they are none."""
    shape, dtype = jnp.shape(group_sizes), jnp.result_type(group_sizes)
    if dtype != jnp.int32 or len(shape) != 1 or shape[0] < 1:
        raise ValueError(
            f"{name} takes group_sizes as int32 [g] of at least one group, got "
            f"{dtype}{list(shape)}."
        )
