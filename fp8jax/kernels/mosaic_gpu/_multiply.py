"""A math warpgroup of the GEMMs: multiplies, and promotes every chunk of 128 of k."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels.mosaic_gpu._common import await_stores, ceil_div
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig
from fp8jax.kernels.mosaic_gpu._schedule import Block, Dense, Index, walk


def multiply(
    lhs_scale: Any,
    rhs_scale: tuple[Any, ...],
    tables: tuple,
    schedule: Dense,
    config: GemmConfig,
    store: Callable[..., None],
    *,
    full,
    empty,
    lhs_smem,
    rhs_smem,
    lhs_scale_smem,
    rhs_scale_smem,
) -> None:
    """Multiplies every block of this CTA, and has it stored.

    Args:
        lhs_scale, rhs_scale: read where they are of tiles; of the second rhs for the
            second warpgroup, where two share a block.
        tables: of the schedule.
        schedule, config: which blocks, and their shape.
        store: called with a block's sums, this warpgroup's part of it, in pieces of
            columns; the warpgroup; the first row and column; and the block.
        full, empty, ...: as in `fetch`.
    """
    wg = lax.axis_index("wg")
    wg_m, wg_n = config.wg_m, config.wg_n
    first_row = wg * wg_m if config.split == "m" else 0
    first_column = wg * wg_n if config.split == "n" else 0
    # The columns in pieces that no tile of the rhs divides: one scale each.
    width = math.gcd(wg_n, CHUNK)
    pieces = range(0, wg_n, width)
    # Chunks of a last stage that reaches past the end of k; 0 if there is none.
    last_chunks = ceil_div(schedule.k, CHUNK) % config.chunks
    if schedule.ends_within_stage:
        last_chunks = 0
    # Whether it is multiplied with the zeros past the end: where the device alone knows
    # if a block has any stage.
    has_zeros = last_chunks > 0 and schedule.stores_some_rows

    def lhs_row_factors(stage: Index, i: int):
        """The lhs scales in chunk i of a stage, one a row."""
        return _compat.mosaic_load(
            lhs_scale_smem.at[stage, i, pl.ds(first_row, wg_m)],
            plgpu.Layout.WGMMA.reduce(1),
        )

    def rhs_row_factors(stage: Index, i: int, piece: int):
        """The rhs scales of a piece in chunk i of a stage, one a column."""
        return _compat.mosaic_load(
            rhs_scale_smem.at[stage, i, pl.ds(first_column + piece, width)],
            plgpu.Layout.WGMMA.reduce(0),
        )

    def tile_factor(scale: tuple[Any, ...], row: Index, chunk: Index, block: Block):
        """The scale of an operand's rows from `row` on in a chunk of k: one number."""
        first, *others = scale
        # A block may reach past the last row.
        last_tile = jnp.int32(first.shape[0] - 1)
        tile = lax.min(lax.div(row, jnp.int32(CHUNK)), last_tile)
        real = lax.min(chunk, jnp.int32(block.end - 1)) if has_zeros else chunk
        factor = first[tile, real]
        for second in others:
            factor = lax.select(wg == 0, factor, second[tile, real])
        if not has_zeros:
            return factor
        # A chunk past the end has zero codes and zero scales of rows. The last real
        # scale must not stand in for its own: it may be NaN.
        return jnp.where(chunk < block.end, factor, jnp.float32(0))

    def tile_factors(step: Index, i: int, *, block: Block):
        """The scales of tiles, of either operand, in chunk i: one for each piece."""
        chunk = block.begin + step * config.chunks + i
        if lhs_scale_smem is None:
            row = block.row + first_row
            of_lhs = lhs_scale.at[block.group] if schedule.lhs_in_groups else lhs_scale
            return [tile_factor((of_lhs,), row, chunk, block)] * len(pieces)
        if rhs_scale_smem is not None:
            return None
        of_group = tuple(
            s.at[block.group] if schedule.rhs_in_groups else s for s in rhs_scale
        )
        # Of two matrices each warpgroup has its own, whose columns are all of these.
        column = block.column + (0 if len(rhs_scale) > 1 else first_column)
        return [tile_factor(of_group, column + p, chunk, block) for p in pieces]

    def factors(stage: Index, i: int, of_tiles):
        """What to multiply the product of a chunk by: [wg_m, width] for each piece."""
        shape = (wg_m, width)
        if lhs_scale_smem is None:
            return [
                lax.broadcast_in_dim(rhs_row_factors(stage, i, p) * s, shape, (1,))
                for p, s in zip(pieces, of_tiles, strict=True)
            ]
        left = lhs_row_factors(stage, i)
        if of_tiles is not None:
            return [lax.broadcast_in_dim(left * s, shape, (0,)) for s in of_tiles]
        left = lax.broadcast_in_dim(left, shape, (0,))
        return [
            left * lax.broadcast_in_dim(rhs_row_factors(stage, i, p), shape, (1,))
            for p in pieces
        ]

    accumulator = plgpu.ACC((wg_m, wg_n), jnp.float32)  # pyright: ignore
    # Where a loop may take no step at all, LLVM has an accumulator share a register
    # with the zero of another, which ptxas then has wait. This zero LLVM does not know.
    # In interpret mode nothing can be stored to an accumulator.
    unknown_zero = None
    if schedule.ends_within_stage and not _compat.interprets_kernels():
        unknown_zero = lax.optimization_barrier(jnp.float32(0))

    def multiply_chunks(chunks: list[int], stage: Index, acc, of_tiles, release: bool):
        """Adds chunks of a stage, all in flight together; may then release it."""

        def issue(behind: list[int], running, partial):
            """Starts a chunk, then what runs beside it, then promotes all of them."""
            i, *others = behind
            if running and unknown_zero is not None:  # It is zero, in other registers.
                zero = lax.broadcast_in_dim(unknown_zero, (wg_m, wg_n), ())
                partial[...] = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
            k = slice(i * CHUNK, (i + 1) * CHUNK)
            plgpu.wgmma(
                partial,
                lhs_smem.at[stage].at[pl.ds(first_row, wg_m), k],
                rhs_smem.at[stage].at[pl.ds(first_column, wg_n), k].T,
            )
            running = {**running, i: partial}
            if not others:
                return promote(running)
            # Nested: an accumulator is zeroed where its scope begins, here while the
            # tensor cores are at work.
            return pl.run_scoped(functools.partial(issue, others, running), accumulator)

        def promote(running):
            scales = {i: factors(stage, i, of_tiles(i)) for i in running}
            sums = acc
            for i, partial in running.items():
                # The later products run on while this one is promoted.
                value = plgpu.wgmma_accumulator_load(partial, wait_n=max(running) - i)
                if release and i == chunks[-1]:
                    plgpu.barrier_arrive(empty.at[stage])
                sums = [
                    total + value[:, piece : piece + width] * scale
                    for total, piece, scale in zip(sums, pieces, scales[i], strict=True)
                ]
            return sums

        return pl.run_scoped(functools.partial(issue, chunks, {}), accumulator)

    def multiply_stage(step: Index, carry, block: Block, chunks: int = config.chunks):
        """Adds the first `chunks` of a stage."""
        count, *acc = carry
        stage = lax.rem(count, jnp.int32(config.stages))
        of_tiles = functools.partial(tile_factors, step, block=block)
        if config.scales_ahead:
            ahead = [of_tiles(i) for i in range(chunks)]
            of_tiles = ahead.__getitem__
        plgpu.barrier_wait(full.at[stage])
        for i in range(0, chunks, config.accumulators):
            together = list(range(i, min(i + config.accumulators, chunks)))
            release = together[-1] == chunks - 1
            acc = multiply_chunks(together, stage, acc, of_tiles, release)
        return count + 1, *acc

    def multiply_rest(step: Index, carry, block: Block):
        """A stage that holds another group's chunks behind this one's."""
        count, *acc = carry
        stage = lax.rem(count, jnp.int32(config.stages))
        plgpu.barrier_wait(full.at[stage])
        of_tiles = functools.partial(tile_factors, step, block=block)
        for i in range(config.chunks - 1):
            add = functools.partial(
                multiply_chunks, [i], stage, of_tiles=of_tiles, release=False
            )
            is_past = block.begin + step * config.chunks + i >= block.end
            # The first chunk is this group's: else there were no stage.
            acc = lax.cond(is_past, lambda acc: acc, add, acc) if i else add(acc)
        plgpu.barrier_arrive(empty.at[stage])
        return count + 1, *acc

    def multiply_block(block: Block, count: Index) -> Index:
        zero = plgpu.layout_cast(
            jnp.zeros((wg_m, width), jnp.float32), plgpu.Layout.WGMMA
        )
        steps = block.steps(config)
        if schedule.ends_within_stage:
            steps = lax.div(block.end - block.begin, jnp.int32(config.chunks))
        skips_zeros = last_chunks > 0 and not has_zeros
        if skips_zeros:
            steps -= 1
        carry = lax.fori_loop(
            0,
            steps,
            functools.partial(multiply_stage, block=block),
            (count, *[zero] * len(pieces)),
        )
        if skips_zeros:
            carry = multiply_stage(steps, carry, block, last_chunks)
        if schedule.ends_within_stage and config.chunks > 1:
            carry = lax.cond(
                steps < block.steps(config),
                functools.partial(multiply_rest, steps, block=block),
                lambda carry: carry,
                carry,
            )
        count, *acc = carry
        store(acc, wg, block.row + first_row, block.column + first_column, block)
        return count

    def release_stage(step: Index, count: Index) -> Index:
        stage = lax.rem(count, jnp.int32(config.stages))
        plgpu.barrier_wait(full.at[stage])
        plgpu.barrier_arrive(empty.at[stage])
        return count + 1

    def multiply_some(block: Block, count: Index) -> Index:
        """Of a block that may end before this warpgroup's rows, which then rests."""
        assert block.rows is not None
        row = block.row + first_row
        return lax.cond(
            (row < block.rows[1]) & (row + wg_m > block.rows[0]),
            functools.partial(multiply_block, block),
            lambda c: lax.fori_loop(0, block.steps(config), release_stage, c),
            count,
        )

    body = multiply_some if schedule.stores_some_rows else multiply_block
    walk(schedule, tables, body, jnp.int32(0))
    await_stores()
