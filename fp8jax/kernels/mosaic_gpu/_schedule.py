"""Which block of the output a CTA works on next, and what of the operands it takes.

Four walks, one loop. Dense: every block of [m, n]. Batch: every block of every entry's
[m, n]. Rows in groups: blocks of the rows of one group each, which end where the group
ends. Columns in groups: every block of every group's [m, n], over the group's own part
of the contraction. What depends on the groups' sizes was computed before the launch,
and is read a block ahead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels.mosaic_gpu._common import ceil_div
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig

# Rows of a tile in shared memory: where a copy may begin.
ROW_MULTIPLE = 8

Index = Any  # An int, or an int32 on the device.


class Block(NamedTuple):
    """One CTA's share of the output.

    Attributes:
        row, column: the first row of the lhs and of the rhs, of the output's side each.
        begin, end: the chunks of 128 of k that are added, from one to before the other.
        group: whose rhs, or whose output it is; None where there are no groups. Of a
            batch, the entry.
        rows: the first row that is stored and the one after the last; None for all.
    """

    row: Index
    column: Index
    begin: Index
    end: Index
    group: Index | None = None
    rows: tuple[Index, Index] | None = None

    def steps(self, config: GemmConfig) -> Index:
        """Stages that its contraction takes."""
        if isinstance(self.begin, int) and isinstance(self.end, int):
            return ceil_div(self.end - self.begin, config.chunks)
        chunks = self.end - self.begin + (config.chunks - 1)
        return lax.div(chunks, jnp.int32(config.chunks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Every block of [m, n], in a snake: CTAs that run together share rows and columns.

    Attributes:
        m, n, k: sides.
        config: the block shape.
    """

    m: int
    n: int
    k: int
    config: GemmConfig

    tables = 0  # Arrays that say where groups lie.
    op = "gemm"
    lhs_in_groups = rhs_in_groups = ends_within_stage = stores_some_rows = False

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along m, a cluster's as one, and along n."""
        m_blocks = ceil_div(self.m, self.config.block_m)
        return ceil_div(m_blocks, self.config.cluster), ceil_div(
            self.n, self.config.block_n
        )

    @property
    def outputs(self) -> tuple[int, ...]:
        """How many matrices are written, if not one alone."""
        return ()

    @property
    def most(self) -> int:
        """Blocks, a cluster's as one, at most."""
        return self.grid[0] * self.grid[1]

    def count(self, tables: tuple) -> Index:
        """Blocks, a cluster's as one."""
        return self.most

    def entry(self, index: Index, tables: tuple) -> tuple[Index, ...]:
        """What must be read to know block `index`; of the last one, beyond it."""
        return ()

    def block(self, index: Index, entry: tuple[Index, ...]) -> Block:
        """Block `index`, given its entry."""
        m_block, n_block = self._place(index, self.grid)
        row = _in_cluster(m_block, self.config) * self.config.block_m
        return Block(row, n_block * self.config.block_n, 0, ceil_div(self.k, CHUNK))

    def _place(self, index: Index, grid: tuple[Index, Index]) -> tuple[Index, Index]:
        axis, width = self.config.snake_axis, self.config.snake_width
        return plgpu.planar_snake(index, grid, axis, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Dense):
    """Products of one shape: all blocks of one entry, then of the next.

    Attributes:
        groups: entries of the batch.
    """

    groups: int

    op = "batched_gemm"
    lhs_in_groups = rhs_in_groups = True

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.groups,)

    @property
    def most(self) -> int:
        return self.groups * super().most

    def block(self, index: Index, entry: tuple[Index, ...]) -> Block:
        of_one = jnp.int32(super().most)
        dense = super().block(lax.rem(index, of_one), entry)
        return dense._replace(group=lax.div(index, of_one))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Dense):
    """Blocks that two matrices [n, k] share, half of the columns of each block each."""

    @property
    def grid(self) -> tuple[int, int]:
        return 1, ceil_div(self.n, self.config.block_n // 2)

    def block(self, index: Index, entry: tuple[Index, ...]) -> Block:
        del entry
        column = index * (self.config.block_n // 2)
        # Not a number that is known to reach past few rows.
        return Block(jnp.int32(0), column, 0, ceil_div(self.k, CHUNK))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGroups(Dense):
    """Rows of the lhs in groups: blocks hold rows of one group, and store no others.

    A block begins at a multiple of 8 rows, so a group's first may hold rows of the one
    before. Rows of no group are a group of their own, with nothing to add up.

    Tables, of `row_blocks`: int32 [blocks, 4] and [1].

    Attributes:
        groups: how many.
    """

    groups: int

    tables = 2
    op = "grouped_gemm"
    rhs_in_groups = stores_some_rows = True

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.block_m * self.config.cluster
        return count_row_blocks(self.m, self.groups, side), ceil_div(
            self.n, self.config.block_n
        )

    def count(self, tables: tuple) -> Index:
        return tables[1][0] * self.grid[1]

    def entry(self, index: Index, tables: tuple) -> tuple[Index, ...]:
        index = lax.min(index, self.count(tables) - 1)
        m_block, n_block = self._place(index, (tables[1][0], self.grid[1]))
        return n_block, *(tables[0][m_block, i] for i in range(4))

    def block(self, index: Index, entry: tuple[Index, ...]) -> Block:
        n_block, group, first, begin, end = entry
        chunks = jnp.int32(ceil_div(self.k, CHUNK))
        chunks = lax.select(group < self.groups, chunks, jnp.int32(0))
        row = first + _in_cluster(0, self.config) * self.config.block_m
        column = n_block * self.config.block_n
        return Block(row, column, jnp.int32(0), chunks, group, (begin, end))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnGroups(Dense):
    """The contraction in groups, a product each: all blocks of one, then of the next.

    Table, of `column_chunks`: int32 [groups, 2].

    Attributes:
        groups: how many.
    """

    groups: int

    tables = 1
    op = "grouped_gemm_k"
    ends_within_stage = True

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.groups,)

    @property
    def most(self) -> int:
        return self.groups * self.grid[0] * self.grid[1]

    def entry(self, index: Index, tables: tuple) -> tuple[Index, ...]:
        index = lax.min(index, jnp.int32(self.most - 1))
        group = lax.div(index, jnp.int32(self.grid[0] * self.grid[1]))
        return group, tables[0][group, 0], tables[0][group, 1]

    def block(self, index: Index, entry: tuple[Index, ...]) -> Block:
        group, begin, end = entry
        of_group = lax.rem(index, jnp.int32(self.grid[0] * self.grid[1]))
        dense = super().block(of_group, ())
        return dense._replace(begin=begin, end=end, group=group)


def walk(
    schedule: Dense, tables: tuple, body: Callable[[Block, Any], Any], carry: Any
) -> Any:
    """`carry = body(block, carry)` for each block of this CTA, in order."""
    first, ctas = lax.axis_index("grid"), lax.axis_size("grid")

    def step(info, carry):
        (index,) = info.index
        entry, carry = carry
        # Read while this block is multiplied: nothing waits for it.
        ahead = schedule.entry(index + ctas, tables)
        return ahead, body(schedule.block(index, entry), carry)

    loop = plgpu.nd_loop(
        (schedule.count(tables),),
        collective_axes="grid",
        init_carry=(schedule.entry(first, tables), carry),
    )
    return loop(step)[1]


def _in_cluster(m_block: Index, config: GemmConfig) -> Index:
    """The block along m that is this CTA's, of those of a cluster."""
    if config.cluster == 1:
        return m_block
    # The last cluster may reach past m: it then reads zeros, stores none.
    return m_block * config.cluster + lax.axis_index("cluster")


def count_row_blocks(rows: int, groups: int, side: int) -> int:
    """The most blocks of `side` rows that `row_blocks` makes.

    Each group, the rows of none among them, has up to 7 rows more than its own, and
    ends within a block.
    """
    begun = min(groups + 1, rows)
    return (rows + begun * (ROW_MULTIPLE - 1 + side - 1)) // side


def row_blocks(
    group_sizes: jax.Array, rows: int, side: int
) -> tuple[jax.Array, jax.Array]:
    """What `RowGroups` reads: blocks of `side` rows that hold rows of one group.

    Args:
        group_sizes: int32 [groups].
        rows: of all groups, and of none.
        side: rows of a block.

    Returns:
        int32 [blocks, 4]: group (their number, for rows of none), first row, a multiple
        of 8, and the group's first row and the one after its last; and int32 [1], how
        many blocks there are.
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    ends = jnp.append(ends, jnp.int32(rows))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    firsts = starts // ROW_MULTIPLE * ROW_MULTIPLE
    needed = jnp.where(ends > starts, -(-(ends - firsts) // side), 0)
    block_ends = jnp.cumsum(needed, dtype=jnp.int32)
    count = count_row_blocks(rows, len(group_sizes), side)
    index = jnp.arange(count, dtype=jnp.int32)
    group = (index[:, None] >= block_ends[None]).sum(axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, len(group_sizes))  # Of blocks that nobody needs.
    first = (firsts - (block_ends - needed) * side)[group] + index * side
    table = jnp.stack([group, first, starts[group], ends[group]], axis=1)
    return table, block_ends[-1:]


def column_chunks(group_sizes: jax.Array) -> jax.Array:
    """What `ColumnGroups` reads: int32 [groups, 2], each group's chunks of 128 columns.

    The first one, and the one after the last: groups begin at whole chunks.
    """
    chunks = -(-group_sizes // CHUNK)
    ends = jnp.cumsum(chunks, dtype=jnp.int32)
    return jnp.stack([ends - chunks, ends], axis=1)
