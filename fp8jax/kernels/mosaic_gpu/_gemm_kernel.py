"""The body of the FP8 GEMM kernels: a warp-specialized pipeline for Hopper.

One memory warpgroup copies blocks of both operands and their scales into a ring of
stages in shared memory; two math warpgroups multiply them and promote every chunk of
128 of k into FP32 accumulators that live in registers. Stages are counted across output
blocks, so the memory warpgroup is already fetching the next block while the last one is
being stored: there is no bubble between blocks.

The two GEMMs differ only in the rhs scale. In 1d2d it is one number a (block_n, chunk),
read from global memory; in 1d1d it is a row of block_n numbers, fetched with the stage.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels.mosaic_gpu._common import ceil_div, swizzled
from fp8jax.kernels.mosaic_gpu._config import (
    CHUNK,
    OUT_SLICE_BYTES,
    OUT_SLOTS,
    SMEM_BYTES,
    GemmConfig,
)

# What the copies need of m and n: whole rows of 8 in a swizzled tile, and whole slices
# of the output.
ROW_MULTIPLE = 8
COLUMN_MULTIPLE = 32
# NOTE: an output of one slice's columns is stored wrongly: a slice beyond its edge is
# not cut off, as elsewhere, but lands on the first one (seen on a GPU with bfloat16 and
# 32 columns; interpret mode does not show it).
FEWEST_COLUMNS = 64

_MATH_WARPGROUPS = 2
_MEMORY_REGISTERS = 40
_MATH_REGISTERS = 232  # (64K registers / 128 threads - 40) / 2, a multiple of 8.

# Bytes of an 8-bit row that the swizzled layout of wgmma keeps together.
_OPERAND = swizzled(CHUNK, CHUNK)


def gemm_padded(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: GemmConfig,
    num_sms: int,
    rhs_scale_rows: bool,
    transposed: bool = False,
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Launches the kernel on operands that fit its copies.

    Args:
        lhs: FP8 [m, k], m a multiple of 8, k of 128.
        lhs_scale: float32 [k / 128, m].
        rhs: FP8 [n, k], n a multiple of 8. The side of the output that is contiguous,
            n or, where `transposed`, m, is a multiple of 32 and at least 64.
        rhs_scale: float32, [ceil(n / 128), k / 128], or [k / 128, n] where
            `rhs_scale_rows`.
        out_dtype: bfloat16 or float32.
        config: the block shape.
        num_sms: multiprocessors to fill.
        rhs_scale_rows: whether every rhs row has scales of its own (1d1d).
        transposed: whether to store the product as [n, m].
        accumulate: what to add the product to, of the result's shape and dtype
            float32; in place, where XLA need not keep it.

    Returns:
        [m, n], or [n, m], of `out_dtype`.
    """
    m, n = lhs.shape[0], rhs.shape[0]
    assert config.smem_bytes(rhs_scale_rows=rhs_scale_rows) <= SMEM_BYTES, config
    m_blocks, n_blocks = ceil_div(m, config.block_m), ceil_div(n, config.block_n)
    work = ceil_div(m_blocks, config.cluster) * n_blocks

    if config.cluster > 1:
        cluster = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    else:
        cluster, empty = {}, plgpu.Barrier
    slot = (config.stages, config.chunks)
    out_columns = OUT_SLICE_BYTES // jnp.dtype(out_dtype).itemsize
    out_slice = (config.wg_m, out_columns)
    scratch = {
        "lhs_smem": plgpu.SMEM(
            (config.stages, config.block_m, config.chunks * CHUNK),
            lhs.dtype,
            transforms=_OPERAND,
        ),
        "rhs_smem": plgpu.SMEM(
            (config.stages, config.block_n, config.chunks * CHUNK),
            rhs.dtype,
            transforms=_OPERAND,
        ),
        "lhs_scale_smem": plgpu.SMEM((*slot, config.block_m), jnp.float32),
        "rhs_scale_smem": (
            plgpu.SMEM((*slot, config.block_n), jnp.float32) if rhs_scale_rows else None
        ),
        "out_smem": plgpu.SMEM(
            (
                _MATH_WARPGROUPS,
                OUT_SLOTS,
                *(out_slice[::-1] if transposed else out_slice),
            ),
            out_dtype,
            transforms=swizzled(out_columns, OUT_SLICE_BYTES),
        ),
        "full": plgpu.Barrier(
            num_arrivals=4 if rhs_scale_rows else 3, num_barriers=config.stages
        ),
        "empty": empty(num_arrivals=_MATH_WARPGROUPS, num_barriers=config.stages),
    }
    out_type = jax.ShapeDtypeStruct((n, m) if transposed else (m, n), out_dtype)
    store = functools.partial(
        _store, config=config, transposed=transposed, add=accumulate is not None
    )
    launch = plgpu.kernel(
        functools.partial(_body, config=config, store=store),
        out_type=() if accumulate is not None else out_type,
        scratch_types=scratch,
        grid=(max(1, min(num_sms // config.cluster, work)),),
        grid_names=("grid",),
        num_threads=_MATH_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **cluster,
    )
    if accumulate is None:
        return launch(lhs, lhs_scale, rhs, rhs_scale)
    out = jax.new_ref(accumulate)
    launch(lhs, lhs_scale, rhs, rhs_scale, out)
    return jax.freeze(out)


def _body(
    lhs,
    lhs_scale,
    rhs,
    rhs_scale,
    out,
    *,
    config: GemmConfig,
    store,
    full,
    empty,
    out_smem,
    **smem,
):
    """Splits the warpgroups: two that multiply, one that fetches."""

    def multiply() -> None:
        plgpu.set_max_registers(_MATH_REGISTERS, action="increase")
        store_block = functools.partial(store, out=out, slots=out_smem)
        _multiply(
            rhs_scale, store_block, (lhs, rhs), full, empty, config=config, **smem
        )

    def fetch() -> None:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _fetch(lhs, lhs_scale, rhs, rhs_scale, full, empty, config=config, **smem)

    lax.cond(lax.axis_index("wg") < _MATH_WARPGROUPS, multiply, fetch)


def _blocks(lhs, rhs, config: GemmConfig):
    """A loop over the output blocks of this CTA: decorates `body(m_block, n_block)`."""
    m_blocks = ceil_div(lhs.shape[0], config.block_m)
    grid = (ceil_div(m_blocks, config.cluster), ceil_div(rhs.shape[0], config.block_n))

    def loop(body, count):
        def step(info, carry):
            (index,) = info.index
            m_block, n_block = plgpu.planar_snake(
                index, grid, config.snake_axis, config.snake_width
            )
            if config.cluster > 1:
                # The last cluster may reach past m: it then reads zeros, stores none.
                m_block = m_block * config.cluster + lax.axis_index("cluster")
            return body(m_block, n_block, carry)

        return plgpu.nd_loop(
            (grid[0] * grid[1],), collective_axes="grid", init_carry=count
        )(step)

    return loop


def _steps(lhs, config: GemmConfig) -> int:
    return ceil_div(lhs.shape[1], config.chunks * CHUNK)


def _fetch(
    lhs,
    lhs_scale,
    rhs,
    rhs_scale,
    full,
    empty,
    *,
    config: GemmConfig,
    lhs_smem,
    rhs_smem,
    lhs_scale_smem,
    rhs_scale_smem,
) -> None:
    """The memory warpgroup: fills stage after stage as they become empty."""
    steps = _steps(lhs, config)
    shared = "cluster" if config.cluster > 1 else None
    # With fewer rows than a block has, the others keep what they held: nothing of them
    # is stored. To fetch zeros for them takes a fifth of the time of 16 rows.
    present = min(config.block_m, lhs.shape[0])

    def fetch_block(m_block, n_block, count):
        first_row = m_block * config.block_m
        columns = pl.ds(n_block * config.block_n, config.block_n)

        def fetch_stage(step, count):
            stage = lax.rem(count, jnp.int32(config.stages))

            @pl.when(count >= config.stages)
            def _wait():
                plgpu.barrier_wait(empty.at[stage])

            # NOTE: past the end of k a copy yields zeros, for codes and scales alike.
            k = pl.ds(step * (config.chunks * CHUNK), config.chunks * CHUNK)
            chunks = pl.ds(step * config.chunks, config.chunks)
            done = full.at[stage]
            plgpu.copy_gmem_to_smem(
                rhs.at[columns, k], rhs_smem.at[stage], done, collective_axes=shared
            )
            plgpu.copy_gmem_to_smem(
                lhs.at[pl.ds(first_row, present), k],
                lhs_smem.at[stage].at[pl.ds(0, present)],
                done,
            )
            plgpu.copy_gmem_to_smem(
                lhs_scale.at[chunks, pl.ds(first_row, config.block_m)],
                lhs_scale_smem.at[stage],
                done,
            )
            if rhs_scale_smem is not None:
                plgpu.copy_gmem_to_smem(
                    rhs_scale.at[chunks, columns], rhs_scale_smem.at[stage], done
                )
            return count + 1

        return lax.fori_loop(0, steps, fetch_stage, count)

    count = _blocks(lhs, rhs, config)(fetch_block, jnp.int32(0))

    # Drain: no CTA may exit while its neighbour still signals its barriers.
    @pl.loop(0, lax.min(count, jnp.int32(config.stages)))
    def _drain(i):
        stage = lax.rem(
            count - lax.min(count, jnp.int32(config.stages)) + i,
            jnp.int32(config.stages),
        )
        plgpu.barrier_wait(empty.at[stage])


def _multiply(
    rhs_scale,
    store,
    operands,
    full,
    empty,
    *,
    config: GemmConfig,
    lhs_smem,
    rhs_smem,
    lhs_scale_smem,
    rhs_scale_smem,
) -> None:
    """A math warpgroup: multiplies, promotes, stores."""
    lhs, rhs = operands
    steps = _steps(lhs, config)
    num_chunks = lhs.shape[1] // CHUNK
    wg = lax.axis_index("wg")
    wg_m, wg_n = config.wg_m, config.wg_n
    first_row = wg * wg_m if config.split == "m" else 0
    first_column = wg * wg_n if config.split == "n" else 0
    # The columns in pieces that no tile of the rhs divides: one scale each.
    width = math.gcd(wg_n, CHUNK)
    pieces = range(0, wg_n, width)

    def rhs_row_factors(stage, i, piece):
        """The rhs scales of a piece in chunk i of a stage, one a column."""
        return _compat.mosaic_load(
            rhs_scale_smem.at[stage, i, pl.ds(first_column + piece, width)],
            plgpu.Layout.WGMMA.reduce(0),
        )

    def rhs_tile_factor(chunk, n_block, piece):
        """The rhs scale of a piece in a chunk of k: one number."""
        last_tile = jnp.int32(rhs_scale.shape[0] - 1)
        column = n_block * config.block_n + first_column + piece
        # A block may reach past the last column.
        tile = lax.min(lax.div(column, jnp.int32(CHUNK)), last_tile)
        if num_chunks % config.chunks == 0:
            return rhs_scale[tile, chunk]
        # The chunk past the end has zero codes and zero lhs scales. The last real
        # scale must not stand in for its own: it may be NaN.
        real = lax.min(chunk, jnp.int32(num_chunks - 1))
        return jnp.where(chunk < num_chunks, rhs_scale[tile, real], jnp.float32(0))

    def tile_factors(step, i, n_block):
        """The rhs scales of chunk i for the pieces, where they are of tiles."""
        if rhs_scale_smem is not None:
            return None
        return [rhs_tile_factor(step * config.chunks + i, n_block, p) for p in pieces]

    def factors(stage, i, of_tiles):
        """What to multiply the product of a chunk by: [wg_m, width] for each piece."""
        left = _compat.mosaic_load(
            lhs_scale_smem.at[stage, i, pl.ds(first_row, wg_m)],
            plgpu.Layout.WGMMA.reduce(1),
        )
        shape = (wg_m, width)
        if of_tiles is not None:
            return [lax.broadcast_in_dim(left * s, shape, (0,)) for s in of_tiles]
        left = lax.broadcast_in_dim(left, shape, (0,))
        return [
            left * lax.broadcast_in_dim(rhs_row_factors(stage, i, p), shape, (1,))
            for p in pieces
        ]

    def multiply_stage(step, carry, n_block):
        count, *acc = carry
        stage = lax.rem(count, jnp.int32(config.stages))
        ahead = [
            tile_factors(step, i, n_block) if config.scales_ahead else None
            for i in range(config.chunks)
        ]
        plgpu.barrier_wait(full.at[stage])

        def issue(i, sums, running, partial):
            """Starts chunk i, then what runs beside it, then promotes all of them."""
            k = slice(i * CHUNK, (i + 1) * CHUNK)
            plgpu.wgmma(
                partial,
                lhs_smem.at[stage].at[pl.ds(first_row, wg_m), k],
                rhs_smem.at[stage].at[pl.ds(first_column, wg_n), k].T,
            )
            running = {**running, i: partial}
            if len(running) == config.accumulators:
                return promote(sums, running)
            # Nested: an accumulator is zeroed where its scope begins, here while the
            # tensor cores are at work.
            begin = functools.partial(issue, i + 1, sums, running)
            return pl.run_scoped(begin, accumulator)

        def promote(sums, running):
            scales = {
                i: factors(stage, i, ahead[i] or tile_factors(step, i, n_block))
                for i in running
            }
            for i, partial in running.items():
                # The later products run on while this one is promoted.
                value = plgpu.wgmma_accumulator_load(partial, wait_n=max(running) - i)
                if i == config.chunks - 1:
                    plgpu.barrier_arrive(empty.at[stage])
                sums = [
                    total + value[:, piece : piece + width] * scale
                    for total, piece, scale in zip(sums, pieces, scales[i], strict=True)
                ]
            return sums

        accumulator = plgpu.ACC((wg_m, wg_n), jnp.float32)  # pyright: ignore
        for i in range(0, config.chunks, config.accumulators):
            acc = pl.run_scoped(functools.partial(issue, i, acc, {}), accumulator)
        return count + 1, *acc

    def multiply_block(m_block, n_block, count):
        zero = plgpu.layout_cast(
            jnp.zeros((wg_m, width), jnp.float32), plgpu.Layout.WGMMA
        )
        count, *acc = lax.fori_loop(
            0,
            steps,
            functools.partial(multiply_stage, n_block=n_block),
            (count, *[zero] * len(pieces)),
        )
        row = m_block * config.block_m + first_row
        column = n_block * config.block_n + first_column
        store(acc, wg, row, column)
        return count

    _blocks(lhs, rhs, config)(multiply_block, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _store(
    acc: list[jax.Array],
    wg,
    row,
    column,
    *,
    out,
    slots,
    config: GemmConfig,
    transposed: bool,
    add: bool,
) -> None:
    """Rounds and stores, or adds, a warpgroup's block, a slice of columns at a time."""
    piece, width = acc[0].shape[1], OUT_SLICE_BYTES // jnp.dtype(out.dtype).itemsize
    slices = len(acc) * piece // width
    assert piece % width == 0
    for i in range(slices):
        # What used this slot last has left shared memory: of the block before, which is
        # long ago, everything; of this one, all but the latest slices.
        if i == 0 or i >= OUT_SLOTS:
            in_flight = OUT_SLOTS - 1 if i else 0
            plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        slot = slots.at[wg, i % OUT_SLOTS]
        source, start = divmod(i * width, piece)
        values = acc[source][:, start : start + width]
        rows, columns = pl.ds(row, config.wg_m), pl.ds(column + i * width, width)
        if transposed:
            values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
            slot.T[...] = values.astype(out.dtype)
            target = out.at[columns, rows]
        else:
            slot[...] = values.astype(out.dtype)
            target = out.at[rows, columns]
        plgpu.commit_smem()
        # The copy engine adds where the memory is: nothing is read back.
        plgpu.copy_smem_to_gmem(slot, target, reduction_op="add" if add else None)
