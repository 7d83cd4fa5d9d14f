"""Arrays in, FP8 out: one pass over 128x128 blocks, for any number of outputs.

A CTA is a warpgroup, or two that share a block, and walks blocks of 128x128 with the
next ones in flight. A block sits in registers in wgmma's layout, in which a row belongs
to four threads: the maximum of a row needs no shared memory. The transposed read of the
same block serves the codes that leave transposed ([k, m]), as the wgrad GEMM wants
them: one read of global memory makes both.

Where the quantized values are computed from several inputs, they are written over the
blocks of inputs of their dtype in shared memory: all directions then see the same
numbers, those that a separate pass would have written.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels.mosaic_gpu._blocks_config import BlocksConfig
from fp8jax.kernels.mosaic_gpu._blocks_values import BOX, ROW, Direction, Format, Values
from fp8jax.kernels.mosaic_gpu._common import (
    await_stores,
    called,
    ceil_div,
    kernel_name,
    launcher,
    num_sms,
    swizzled,
)
from fp8jax.kernels.mosaic_gpu._encode import BLOCK, amax_bits, encode, scales

_PIECE = 64  # Side of what is computed at a time: 32 numbers of an input a thread.
_VECTOR_SLOTS = 2  # Pieces of a vector in shared memory at a time.
_PER_ROW: Any = plgpu.Layout.WGMMA.reduce(1)


def launch(
    inputs: tuple[jax.Array, ...],
    vectors: tuple[jax.Array, ...],
    values: Values,
    fmt: Format,
    *,
    config: BlocksConfig,
    stacked: int = 1,
) -> tuple[jax.Array, ...]:
    """Codes and scales of each value in each direction, in order.

    Args:
        inputs: [m, k], k in whole blocks and m in 8 rows; in whole blocks too where
            codes leave transposed.
        vectors: float32 [m] or [k], in whole blocks, as `values.sides` says.
        values, fmt: what is quantized, and as what.
        config: what shared memory holds, and who shares it.
        stacked: matrices of whole blocks that the inputs are, one below the other. So
            are their transposes then: [stacked * k, m / stacked].
    """
    m, k = inputs[0].shape
    m_blocks, k_blocks = ceil_div(m, BLOCK), ceil_div(k, BLOCK)
    outputs = []
    directions = [*itertools.chain(*values.directions)]
    for direction in directions:
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
    dtypes = [x.dtype for x in inputs]
    places = values.places(dtypes)
    own = [d for d, place in zip(values.dtypes, places, strict=True) if place is None]
    threads: dict[str, Any] = {}
    if config.warpgroups > 1:
        threads = {"num_threads": config.warpgroups, "thread_name": "wg"}
    scratch: dict[str, Any] = {
        "in_smem": [
            _blocks_of(slots, dtype)
            for slots, dtype in zip(config.slots, dtypes, strict=True)
        ],
        "codes_smem": _blocks_of(config.buffers, fmt.dtype),
        "scale_smem": plgpu.SMEM((config.buffers, BLOCK), jnp.float32),
        "full": plgpu.Barrier(num_barriers=sum(config.slots)),
        "met": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    if own:
        scratch["own_smem"] = [_blocks_of(1, dtype) for dtype in own]
    if vectors:
        scratch["vector_smem"] = [
            plgpu.SMEM((_VECTOR_SLOTS, BLOCK), jnp.float32) for _ in vectors
        ]
        scratch["vectors_full"] = plgpu.Barrier(
            num_barriers=_VECTOR_SLOTS, num_arrivals=len(vectors)
        )
    if config.warpgroups > 1 and BOX in (d.tile for d in directions):
        scratch["peaks_smem"] = plgpu.SMEM((BLOCK,), jnp.int32)
    run = launcher(
        functools.partial(
            _body, values=values, places=places, fmt=fmt, config=config, stacked=stacked
        ),
        kernel_name=kernel_name(
            values.op, *(d.name for d in directions), sides=inputs[0].shape
        ),
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=(min(num_sms() * config.ctas_per_sm, m_blocks * k_blocks),),
        grid_names=("grid",),
        **threads,
        compiler_params=plgpu.CompilerParams(
            # Exponentials and roots in an instruction each, right to some 20 bits of
            # values that end as FP8. It does not touch divisions by scales.
            approx_math=values.compute is not None,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    return called(run, *inputs, *vectors)


def _blocks_of(count: int, dtype: np.dtype) -> Any:
    """Shared memory for `count` blocks, in a layout for tensor copies and registers."""
    return plgpu.SMEM((count, BLOCK, BLOCK), dtype, transforms=_layout_of(dtype))


def _layout_of(dtype: np.dtype) -> tuple[Any, ...]:
    return swizzled(BLOCK // dtype.itemsize, BLOCK)  # 128 bytes, the widest swizzle.


def _body(
    *refs,
    values: Values,
    places: tuple[int | None, ...],
    fmt: Format,
    config: BlocksConfig,
    stacked: int,
    in_smem,
    codes_smem,
    scale_smem,
    full,
    met,
    own_smem=(),
    vector_smem=(),
    vectors_full: Any = None,
    peaks_smem=None,
) -> None:
    """One CTA: every grid-th block, row after row of blocks.

    Of two warpgroups each takes half of the rows, and of the columns where codes leave
    transposed; the first one fetches.
    """
    num_inputs, num_vectors = len(config.slots), len(values.sides)
    inputs, vectors = refs[:num_inputs], refs[num_inputs : num_inputs + num_vectors]
    outputs = refs[num_inputs + num_vectors :]
    m, k = inputs[0].shape
    k_blocks = ceil_div(k, BLOCK)
    num_blocks = ceil_div(m, BLOCK) * k_blocks
    first, ctas = lax.axis_index("grid"), lax.axis_size("grid")
    warpgroup = lax.axis_index("wg") if config.warpgroups > 1 else 0
    # A warpgroup's registers hold 64 rows or 128: of few, the others are not there.
    all_directions = [*itertools.chain(*values.directions)]
    by_rows = all(d == Direction(ROW, False) for d in all_directions)
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

    def whole_block(bits: jax.Array) -> jax.Array:
        """The largest of a block's maxima, of all warpgroups, for each of the rows."""
        if config.warpgroups == 1:
            return lax.broadcast_in_dim(jnp.max(bits), bits.shape, ())
        # The maximum of all registers would go through memory that Mosaic has once for
        # all warpgroups. That of a table of all rows by all rows stays in registers.
        assert peaks_smem is not None, "warpgroups that share a tile exchange maxima"
        peaks = peaks_smem.at[pl.ds(start, share)]
        _compat.mosaic_store(peaks, plgpu.layout_cast(bits, _PER_ROW), _PER_ROW)
        meet()
        rows = _compat.mosaic_load(peaks_smem, plgpu.Layout.WGMMA.reduce(0))
        return jnp.max(lax.broadcast_in_dim(rows, (share, BLOCK), (1,)), axis=1)

    def slot(number: int, step):
        """Which of an input's places in shared memory block `step` of this CTA has."""
        return lax.rem(step, jnp.int32(config.slots[number]))

    def arrived(number: int, step):
        return full.at[sum(config.slots[:number]) + slot(number, step)]

    def fetch(number: int, step) -> None:
        block = first + step * ctas

        @pl.when((block < num_blocks) & (start == 0))
        def _copy():
            row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
            plgpu.copy_gmem_to_smem(
                inputs[number].at[
                    pl.ds(row * BLOCK, side), pl.ds(column * BLOCK, BLOCK)
                ],
                in_smem[number].at[slot(number, step), pl.ds(0, side)],
                arrived(number, step),
            )

    def fetch_vectors(step) -> None:
        block, place = first + step * ctas, lax.rem(step, jnp.int32(_VECTOR_SLOTS))

        @pl.when((block < num_blocks) & (start == 0))
        def _copy():
            at = lax.div(block, k_blocks), lax.rem(block, k_blocks)
            for x, smem, along in zip(vectors, vector_smem, values.sides, strict=True):
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(at[along] * BLOCK, BLOCK)],
                    smem.at[place],
                    vectors_full.at[place],
                )

    for number, slots in enumerate(config.slots):
        for step in range(slots):
            fetch(number, jnp.int32(step))
    if vectors:
        for step in range(_VECTOR_SLOTS):
            fetch_vectors(jnp.int32(step))

    def turned(row, column):
        """Where block `row, column` is in the transposed matrix, or its own of some."""
        if stacked == 1:
            return column, row
        m_blocks = jnp.int32(m // BLOCK // stacked)
        return lax.div(row, m_blocks) * k_blocks + column, lax.rem(row, m_blocks)

    def quantize_block(info) -> None:
        (block,) = info.index
        row, column = lax.div(block, k_blocks), lax.rem(block, k_blocks)
        step = info.local_index
        for number in range(num_inputs):
            plgpu.barrier_wait(arrived(number, step))
        blocks = [in_smem[n].at[slot(n, step)] for n in range(num_inputs)]
        free = iter(own_smem)
        sources = [next(free).at[0] if n is None else blocks[n] for n in places]

        def refill(number: int) -> None:
            fetch(number, step + config.slots[number])

        def refill_others() -> None:
            """Fetches again what no value has been written over."""
            for number in range(num_inputs):
                if number not in places:
                    refill(number)
            if vectors:
                fetch_vectors(step + _VECTOR_SLOTS)

        place = lax.rem(step, jnp.int32(_VECTOR_SLOTS))
        if vectors:
            plgpu.barrier_wait(vectors_full.at[place])
        here = [smem.at[place] for smem in vector_smem]
        computed = None
        if values.is_direct:
            at = (start, share), (0, BLOCK)
            (computed,) = _computed(values, blocks, here, at)
        elif values.compute is not None:
            _compute_in_place(values, blocks, here, sources, start, share)
            meet()
            refill_others()

        output = 0
        for value, directions in enumerate(values.directions):
            box = None  # Scales of the whole block, the same in both directions.
            for direction in directions:
                is_box = direction.tile == BOX
                at, source = (row, column), sources[value]
                if direction.transposed:
                    at, source = turned(*at), source.at[:, pl.ds(start, share)].T
                else:
                    source = source.at[pl.ds(start, share)]
                buffer = output % config.buffers, pl.ds(start, share)
                factors = _store(
                    _load(source, direction) if computed is None else computed,
                    (outputs[2 * output], outputs[2 * output + 1]),
                    (at[0] * BLOCK + start, at[1]),
                    direction,
                    fmt,
                    box if is_box else None,
                    whole_block,
                    codes_smem.at[buffer],
                    scale_smem.at[buffer],
                    in_flight=config.buffers - 1,
                )
                box = factors if is_box else box
                output += 1
            if config.warpgroups > 1:
                meet()  # Of one, the warps met before its codes left.
            if values.is_direct:
                refill_others()
            number = places[value]
            if number is not None:
                refill(number)

    plgpu.nd_loop((num_blocks,), collective_axes="grid")(quantize_block)
    await_stores()


def _compute_in_place(
    values: Values,
    blocks: list[Any],
    vectors: list[Any],
    targets: list[Any],
    start: Any,
    share: int,
) -> None:
    """Computes the values piece by piece, to save registers, into shared memory.

    Of the blocks' `share` rows from `start` on. A target may be one of the blocks: a
    piece is read whole before it is written over.
    """
    across = BLOCK // _PIECE

    def compute_piece(number, carry):
        row, column = lax.div(number, across), lax.rem(number, across)
        at = (start + row * _PIECE, _PIECE), (column * _PIECE, _PIECE)
        found = _computed(values, blocks, vectors, at)
        for target, value in zip(targets, found, strict=True):
            piece = tuple(pl.ds(*side) for side in at)
            _put(target.at[piece], value.astype(target.dtype))
        return carry

    lax.fori_loop(0, share // _PIECE * across, compute_piece, None)


def _computed(
    values: Values, blocks: list[Any], vectors: list[Any], at: Any
) -> list[jax.Array]:
    """A piece of each value in registers, float32 but rounded to the value's dtype.

    Args:
        values: what is computed.
        blocks, vectors: what it is computed from, in shared memory.
        at: of the piece, where it begins and how long it is, on both sides.
    """
    assert values.compute is not None
    piece, shape = tuple(pl.ds(*side) for side in at), tuple(size for _, size in at)
    layout = plgpu.Layout.WGMMA
    pieces = [_compat.mosaic_load(block.at[piece], layout) for block in blocks]
    for vector, side in zip(vectors, values.sides, strict=True):
        along = _compat.mosaic_load(vector.at[piece[side]], layout.reduce(1 - side))
        pieces.append(lax.broadcast_in_dim(along, shape, (side,)))
    return [
        value.astype(dtype).astype(jnp.float32)
        for value, dtype in zip(values.compute(*pieces), values.dtypes, strict=True)
    ]


def _store(
    values,
    out,
    at,
    direction: Direction,
    fmt: Format,
    shared,
    whole_block: Callable[[jax.Array], jax.Array],
    codes_smem,
    scale_smem,
    *,
    in_flight: int,
):
    """Quantizes rows of a block in one direction and sends them on their way.

    Args:
        values: the rows, float32, in registers.
        out: codes and scales in global memory.
        at: the first of the rows, and the index of the block along the columns.
        shared: scales and reciprocals of the same block's, None to find them.
        whole_block: bits of rows' maxima to those of the block's, for each row.
        codes_smem, scale_smem: where copies to global memory start.
        in_flight: copies that may still be reading other buffers.

    Returns:
        Scales and reciprocals.
    """
    data, scale_out = out
    if shared is None:
        bits = amax_bits(values)
        if direction.tile == BOX:
            bits = whole_block(bits)
        # JAX 0.10 finds no layout, or searches long, without being told.
        bits = plgpu.layout_cast(bits, _PER_ROW)
        shared = scales(bits, fmt.kind, fmt.eps, fmt.dtype)
    scale, inverse = shared
    codes = encode(values, scale, inverse, fmt.kind, fmt.dtype)

    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
    _put(codes_smem, codes)
    _compat.mosaic_store(scale_smem, scale, _PER_ROW)
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


def _put(ref, values: jax.Array) -> None:
    """Stores a piece of a block."""
    _compat.mosaic_store(ref, values, plgpu.Layout.WGMMA, _layout_of(ref.dtype))


def _load(ref, direction: Direction) -> jax.Array:
    """A block in a direction's registers, float32."""
    layout = plgpu.Layout.WGMMA
    if direction.transposed and ref.dtype.itemsize == 4:
        # A load turns 16-bit numbers; these are exchanged between threads after it.
        values = _compat.mosaic_load(ref, plgpu.Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(values, layout)
    return _compat.mosaic_load(ref, layout).astype(jnp.float32)
