"""The memory warpgroup of the GEMMs: stage after stage, as they become empty."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig
from fp8jax.kernels.mosaic_gpu._schedule import Block, Dense, Index, walk


def fetch(
    lhs: Any,
    lhs_scale: Any,
    rhs: tuple[Any, ...],
    rhs_scale: Any,
    tables: tuple,
    schedule: Dense,
    config: GemmConfig,
    *,
    full,
    empty,
    lhs_smem,
    rhs_smem,
    lhs_scale_smem,
    rhs_scale_smem,
) -> None:
    """Copies what every block of this CTA takes, block after block.

    Args:
        lhs: [m, k] or, of a batch, [g, m, k].
        rhs: [n, k] or, in groups, [g, n, k]; several share a block between them.
        lhs_scale, rhs_scale: [k / 128, m or n], where scales are of rows; of a batch,
            the entries' side by side.
        tables: of the schedule.
        schedule, config: which blocks, and their shape.
        full, empty: barriers of the stages.
        lhs_smem, rhs_smem: [stages, rows, k of a stage].
        lhs_scale_smem, rhs_scale_smem: [stages, chunks, rows]; None where scales are
            of tiles.
    """
    shared = "cluster" if config.cluster > 1 else None
    # With fewer rows than a block has, the others keep what they held: nothing of them
    # is stored. To fetch zeros for them takes a fifth of the time of 16 rows.
    present = min(config.block_m, lhs.shape[-2])

    def fetch_block(block: Block, count: Index) -> Index:
        width = config.block_n // len(rhs)
        columns = pl.ds(block.column, width)
        of_rows, first_scale_row, first_scale_column = lhs, block.row, block.column
        if schedule.lhs_in_groups:  # Scales beyond an entry's are of no row stored.
            of_rows = lhs.at[block.group]
            first_scale_row += block.group * lhs.shape[-2]
            first_scale_column += block.group * rhs[0].shape[-2]

        def fetch_stage(step: Index, count: Index) -> Index:
            stage = lax.rem(count, jnp.int32(config.stages))

            @pl.when(count >= config.stages)
            def _wait():
                plgpu.barrier_wait(empty.at[stage])

            done = full.at[stage]
            # NOTE: past the end of k a copy yields zeros, for codes and scales alike.
            # What it brings of another group's is not used.
            chunk = block.begin + step * config.chunks
            k = pl.ds(chunk * CHUNK, config.chunks * CHUNK)
            chunks = pl.ds(chunk, config.chunks)
            for part, source in enumerate(rhs):
                if schedule.rhs_in_groups:
                    source = source.at[block.group]
                plgpu.copy_gmem_to_smem(
                    source.at[columns, k],
                    rhs_smem.at[stage].at[pl.ds(part * width, width)],
                    done,
                    collective_axes=shared,
                )
            plgpu.copy_gmem_to_smem(
                of_rows.at[pl.ds(block.row, present), k],
                lhs_smem.at[stage].at[pl.ds(0, present)],
                done,
            )
            if lhs_scale_smem is not None:
                rows = pl.ds(first_scale_row, config.block_m)
                plgpu.copy_gmem_to_smem(
                    lhs_scale.at[chunks, rows], lhs_scale_smem.at[stage], done
                )
            if rhs_scale_smem is not None:
                of_columns = pl.ds(first_scale_column, width)
                plgpu.copy_gmem_to_smem(
                    rhs_scale.at[chunks, of_columns], rhs_scale_smem.at[stage], done
                )
            return count + 1

        return lax.fori_loop(0, block.steps(config), fetch_stage, count)

    count = walk(schedule, tables, fetch_block, jnp.int32(0))

    # Drain: no CTA may exit while its neighbour still signals its barriers.
    @pl.loop(0, lax.min(count, jnp.int32(config.stages)))
    def _drain(i):
        stage = lax.rem(
            count - lax.min(count, jnp.int32(config.stages)) + i,
            jnp.int32(config.stages),
        )
        plgpu.barrier_wait(empty.at[stage])
