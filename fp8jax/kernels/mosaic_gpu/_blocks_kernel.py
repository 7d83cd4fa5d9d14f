"""Arrays in, FP8 out: one pass over 128x128 blocks, for any number of outputs.

A CTA is a warpgroup, or two that share a block, and walks blocks of 128x128 with the
next ones in flight. A block sits in registers in wgmma's layout, in which a row belongs
to four threads: the maximum of a row needs no shared memory. The transposed read of the
same block serves the codes that leave transposed ([k, m]), as the wgrad GEMM wants
them: one read of global memory makes both.

Where the quantized values are computed from several inputs, they take the first
inputs' place in shared memory, rounded to the inputs' dtype: both directions then see
the same numbers, and those that a separate pass would have written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels._contract import ScaleKind, Tile
from fp8jax.kernels.mosaic_gpu._blocks_config import BlocksConfig
from fp8jax.kernels.mosaic_gpu._common import (
    await_stores,
    called,
    ceil_div,
    num_sms,
    swizzled,
)
from fp8jax.kernels.mosaic_gpu._encode import BLOCK, amax_bits, encode, scales

Compute = Callable[..., tuple[jax.Array, ...]]

ROW: Tile = (1, BLOCK)
_BOX: Tile = (BLOCK, BLOCK)
_PIECE = 64  # Side of what is computed at a time: 32 numbers of an input a thread.


@dataclasses.dataclass(frozen=True)
class Direction:
    """One way to quantize a matrix of values.

    Attributes:
        tile: (1, 128) or (128, 128), of the codes as they are written.
        transposed: whether they are written transposed.
    """

    tile: Tile
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Format:
    """What the codes are: `dtype`, kind of scale, and the floor of amax."""

    dtype: np.dtype
    kind: ScaleKind
    eps: float


def launch(
    inputs: tuple[jax.Array, ...],
    directions: tuple[Direction, ...],
    fmt: Format,
    *,
    compute: Compute | None,
    values: int,
    config: BlocksConfig,
    stacked: int = 1,
) -> tuple[jax.Array, ...]:
    """Codes and scales of each value in each direction, one behind the other.

    Args:
        inputs: [m, k], k in whole blocks and m in 8 rows; in whole blocks too where
            codes leave transposed.
        directions, fmt, compute, values: as in `quantize_blocks`.
        config: what shared memory holds, and who shares it.
        stacked: matrices of whole blocks that the inputs are, one below the other. So
            are their transposes then: [stacked * k, m / stacked].
    """
    (m, k), in_dtype = inputs[0].shape, inputs[0].dtype
    m_blocks, k_blocks = ceil_div(m, BLOCK), ceil_div(k, BLOCK)
    outputs = []
    for direction in directions * values:
        shape, blocks = (m, k), (m_blocks, k_blocks)
        if direction.transposed:
            shape = (stacked * k, m // stacked)
            blocks = (stacked * k_blocks, m_blocks // stacked)
        # NOTE: whole blocks, because Mosaic stores a contiguous slice by a plain bulk
        # copy, which does not stop at the array's end as the tensor copies do. Few
        # rows are one copy by one warpgroup: theirs alone, as the GEMM reads them.
        few = m <= BLOCK // config.warpgroups and not direction.transposed
        per_row = (blocks[1], m if few else blocks[0] * BLOCK)
        scale_shape = per_row if direction.tile == ROW else blocks
        outputs.append(jax.ShapeDtypeStruct(shape, fmt.dtype))
        outputs.append(jax.ShapeDtypeStruct(scale_shape, jnp.float32))
    in_columns = BLOCK // in_dtype.itemsize  # 128 bytes, the widest swizzle.
    slots = sum(config.slots)
    threads: dict[str, Any] = {}
    if config.warpgroups > 1:
        threads = {"num_threads": config.warpgroups, "thread_name": "wg"}
    run = plgpu.kernel(
        functools.partial(
            _body,
            directions=directions,
            fmt=fmt,
            compute=compute,
            values=values,
            config=config,
            stacked=stacked,
        ),
        out_type=tuple(outputs),
        scratch_types={
            "in_smem": plgpu.SMEM(
                (slots, BLOCK, BLOCK), in_dtype, transforms=swizzled(in_columns, BLOCK)
            ),
            "codes_smem": plgpu.SMEM(
                (config.buffers, BLOCK, BLOCK),
                fmt.dtype,
                transforms=swizzled(BLOCK, BLOCK),
            ),
            "scale_smem": plgpu.SMEM((config.buffers, BLOCK), jnp.float32),
            "full": plgpu.Barrier(num_barriers=slots),
            "met": plgpu.Barrier(num_arrivals=config.warpgroups),
        },
        grid=(min(num_sms() * config.ctas_per_sm, m_blocks * k_blocks),),
        grid_names=("grid",),
        **threads,
        compiler_params=plgpu.CompilerParams(
            # Exponentials and roots in an instruction each, right to some 20 bits of
            # values that end as FP8. It does not touch divisions by scales.
            approx_math=compute is not None,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )
    return called(run, *inputs)


def _body(
    *refs,
    directions: tuple[Direction, ...],
    fmt: Format,
    compute: Compute | None,
    values: int,
    config: BlocksConfig,
    stacked: int,
    in_smem,
    codes_smem,
    scale_smem,
    full,
    met,
) -> None:
    """One CTA: every grid-th block, row after row of blocks.

    Of two warpgroups each takes half of the rows, and of the columns where codes leave
    transposed; the first one fetches.
    """
    num_inputs = len(config.slots)
    inputs, outputs = refs[:num_inputs], refs[num_inputs:]
    m, k = inputs[0].shape
    k_blocks = ceil_div(k, BLOCK)
    num_blocks = ceil_div(m, BLOCK) * k_blocks
    first, ctas = lax.axis_index("grid"), lax.axis_size("grid")
    warpgroup = lax.axis_index("wg") if config.warpgroups > 1 else 0
    # A warpgroup's registers hold 64 rows or 128: of few, the others are not there.
    by_rows = all(d == Direction(ROW, False) for d in directions)
    halved = m <= BLOCK // 2 and by_rows and config.warpgroups == 1
    side = BLOCK // 2 if halved else BLOCK
    share = side // config.warpgroups  # Rows of a block that are this warpgroup's.
    start = warpgroup * share

    def meet() -> None:
        """Every warpgroup has read, and what it wrote is seen by all."""
        plgpu.commit_smem()
        if config.warpgroups > 1:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

    def slot(number: int, step):
        """Where block `step` of this CTA, of an input, is in shared memory."""
        return sum(config.slots[:number]) + lax.rem(
            step, jnp.int32(config.slots[number])
        )

    def fetch(number: int, step) -> None:
        block = first + step * ctas

        @pl.when((block < num_blocks) & (start == 0))
        def _copy():
            row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
            plgpu.copy_gmem_to_smem(
                inputs[number].at[
                    pl.ds(row * BLOCK, side), pl.ds(column * BLOCK, BLOCK)
                ],
                in_smem.at[slot(number, step), pl.ds(0, side)],
                full.at[slot(number, step)],
            )

    for number, slots in enumerate(config.slots):
        for step in range(slots):
            fetch(number, jnp.int32(step))

    def turned(row, column):
        """Where block `row, column` is in the transposed matrix, or its own of some."""
        if stacked == 1:
            return column, row
        m_blocks = jnp.int32(m // BLOCK // stacked)
        return lax.div(row, m_blocks) * k_blocks + column, lax.rem(row, m_blocks)

    def quantize_block(info) -> None:
        (block,) = info.index
        row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
        here = [slot(number, info.local_index) for number in range(num_inputs)]
        for s in here:
            plgpu.barrier_wait(full.at[s])
        sources = [in_smem.at[s] for s in here]

        def refill(number: int) -> None:
            fetch(number, info.local_index + config.slots[number])

        if compute is not None:
            _compute_in_place(compute, sources, start, share)
            meet()
            for number in range(values, num_inputs):
                refill(number)

        output = 0
        for value in range(values):
            box = None  # Scales of the whole block, the same in both directions.
            for direction in directions:
                is_box = direction.tile == _BOX
                at, source = (row, column), sources[value]
                if direction.transposed:
                    at, source = turned(*at), source.at[:, pl.ds(start, share)].T
                else:
                    source = source.at[pl.ds(start, share)]
                buffer = output % config.buffers, pl.ds(start, share)
                factors = _store(
                    source,
                    (outputs[2 * output], outputs[2 * output + 1]),
                    (at[0] * BLOCK + start, at[1]),
                    direction,
                    fmt,
                    box if is_box else None,
                    codes_smem.at[buffer],
                    scale_smem.at[buffer],
                    in_flight=config.buffers - 1,
                )
                box = factors if is_box else box
                output += 1
            if config.warpgroups > 1:
                meet()  # Of one, the warps met before its codes left.
            refill(value)

    plgpu.nd_loop((num_blocks,), collective_axes="grid")(quantize_block)
    await_stores()


def _compute_in_place(
    compute: Compute, sources: list[Any], start: Any, share: int
) -> None:
    """The values take the first inputs' place, piece by piece to save registers.

    Of the blocks' `share` rows from `start` on.
    """
    across = BLOCK // _PIECE

    def compute_piece(number, carry):
        row, column = lax.div(number, across), lax.rem(number, across)
        at = pl.ds(start + row * _PIECE, _PIECE), pl.ds(column * _PIECE, _PIECE)
        pieces = [source.at[at] for source in sources]
        found = compute(*map(_load, pieces))
        for piece, value in zip(pieces, found, strict=False):
            piece[...] = value.astype(piece.dtype)
        return carry

    lax.fori_loop(0, share // _PIECE * across, compute_piece, None)


def _store(
    source,
    out,
    at,
    direction: Direction,
    fmt: Format,
    shared,
    codes_smem,
    scale_smem,
    *,
    in_flight: int,
):
    """Quantizes a block of shared memory in one direction and sends it on its way.

    Args:
        source: the rows of the block, of those that are written.
        out: codes and scales in global memory.
        at: the first of the rows, and the index of the block along the columns.
        shared: scales and reciprocals of the same block's, None to find them.
        codes_smem, scale_smem: where copies to global memory start.
        in_flight: copies that may still be reading other buffers.

    Returns:
        Scales and reciprocals.
    """
    data, scale_out = out
    values = _load(source)
    if shared is None:
        bits = amax_bits(values)
        if direction.tile == _BOX:
            bits = lax.broadcast_in_dim(jnp.max(bits), (BLOCK,), ())
        # JAX 0.10 finds no layout, or searches long, without being told.
        bits = plgpu.layout_cast(bits, plgpu.Layout.WGMMA.reduce(1))
        shared = scales(bits, fmt.kind, fmt.eps, fmt.dtype)
    scale, inverse = shared
    codes = encode(values, scale, inverse, fmt.kind, fmt.dtype)

    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
    codes_smem[...] = codes
    scale_smem[...] = scale
    # Also the point where every warp has read its part of the source.
    plgpu.commit_smem()
    row, column = at
    rows = pl.ds(row, values.shape[0])
    if direction.tile == ROW:
        held = min(scale_out.shape[1], values.shape[0])

        @pl.when(row < scale_out.shape[1])
        def _copy_scales():
            plgpu.copy_smem_to_gmem(
                scale_smem.at[pl.ds(0, held)],
                scale_out.at[column, pl.ds(row, held)],
                commit_group=False,
            )
    else:
        scale_out[lax.div(row, BLOCK), column] = scale_smem[0]
    columns = pl.ds(column * BLOCK, BLOCK)
    plgpu.copy_smem_to_gmem(codes_smem, data.at[rows, columns])
    return shared


def _load(ref) -> jax.Array:
    return _compat.mosaic_load(ref, plgpu.Layout.WGMMA).astype(jnp.float32)
