"""How a block of sums leaves the registers of a math warpgroup."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax import _compat
from fp8jax.kernels.mosaic_gpu._common import swizzled
from fp8jax.kernels.mosaic_gpu._config import OUT_SLOTS, GemmConfig
from fp8jax.kernels.mosaic_gpu._schedule import Block

# Of an output row in `store_some_rows`: from each row of it a copy may begin.
_EDGE_BYTES = 128


def slots(
    config: GemmConfig,
    dtype: jax.typing.DTypeLike,
    *,
    transposed: bool,
    some_rows: bool,
) -> Any:
    """Shared memory for what leaves: slices of columns, or all rows of some columns.

    Args:
        config: the block shape.
        dtype: of the output.
        transposed: as in `store`.
        some_rows: whether `store_some_rows` is used, in the same memory.
    """
    slice_bytes = config.out_slice_bytes(jnp.dtype(dtype).itemsize)
    columns = slice_bytes // jnp.dtype(dtype).itemsize
    out_slice = (columns, config.wg_m) if transposed else (config.wg_m, columns)
    whole = plgpu.SMEM(
        (config.warpgroups, OUT_SLOTS, *out_slice),
        dtype,
        transforms=swizzled(columns, slice_bytes),
    )
    if not some_rows:
        return whole
    # As large as three of them are the six slices: the first is the first
    # warpgroup's, the last the other's, and neither touches the other's slices.
    assert config.warpgroups * OUT_SLOTS * slice_bytes == 3 * _EDGE_BYTES
    edge_columns = _EDGE_BYTES // jnp.dtype(dtype).itemsize
    edges = plgpu.SMEM(
        (3, config.wg_m, edge_columns),
        dtype,
        # Not tiled: a row of a tile of 8 is no place for a copy to begin.
        transforms=(plgpu.SwizzleTransform(_EDGE_BYTES),),  # pyright: ignore
    )
    return plgpu.RefUnion(whole, edges)


def store(
    acc: list[jax.Array],
    wg,
    row,
    column,
    block: Block,
    *,
    out,
    slots,
    config: GemmConfig,
    transposed: bool,
    add: bool,
) -> None:
    """Rounds and stores, or adds, a warpgroup's part of a block.

    Args:
        acc: float32 sums, [wg_m, width] for each piece of the columns.
        wg: which warpgroup.
        row, column: where its part begins in the output.
        block: the whole block's place.
        out: [m, n], or in groups [g, m, n].
        slots: of `slots`.
        config: the block shape.
        transposed: whether `out` is [n, m].
        add: whether to add to what `out` holds.
    """
    if block.rows is None:
        of_group = out if block.group is None else out.at[block.group]
        _store_rows(
            acc,
            slots.at[wg],
            of_group,
            row,
            column,
            config,
            transposed=transposed,
            add=add,
        )
        return
    slices, edges = slots
    begin, end = (
        lax.clamp(jnp.int32(0), side - row, jnp.int32(config.wg_m))
        for side in block.rows
    )
    is_whole = (begin == 0) & (end == config.wg_m)

    @pl.when(is_whole)
    def _whole():
        _store_rows(
            acc, slices.at[wg], out, row, column, config, transposed=False, add=False
        )

    @pl.when(~is_whole & (end > begin))
    def _some():
        _store_some_rows(acc, edges.at[2 * wg], out, row, column, begin, end)


def _store_rows(
    acc: list[jax.Array],
    slots,
    out,
    row,
    column,
    config: GemmConfig,
    *,
    transposed: bool,
    add: bool,
) -> None:
    """Every row, a slice of columns at a time."""
    itemsize = jnp.dtype(out.dtype).itemsize
    piece, width = acc[0].shape[1], config.out_slice_bytes(itemsize) // itemsize
    slices = len(acc) * piece // width
    assert piece % width == 0
    for i in range(slices):
        # What used this slot last has left shared memory: of the block before, which is
        # long ago, everything; of this one, all but the latest slices.
        if i == 0 or i >= OUT_SLOTS:
            in_flight = OUT_SLOTS - 1 if i else 0
            plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        slot = slots.at[i % OUT_SLOTS]
        source, start = divmod(i * width, piece)
        values = acc[source][:, start : start + width]
        rows, columns = pl.ds(row, config.wg_m), pl.ds(column + i * width, width)
        layout = plgpu.Layout.WGMMA
        if transposed:
            layout = plgpu.Layout.WGMMA_TRANSPOSED
            values = plgpu.layout_cast(values, layout)
        _compat.mosaic_store(
            slot,
            values.astype(out.dtype),
            layout,
            swizzled(width, width * itemsize),
            turned=transposed,
        )
        target = out.at[columns, rows] if transposed else out.at[rows, columns]
        plgpu.commit_smem()
        # The copy engine adds where the memory is: nothing is read back.
        plgpu.copy_smem_to_gmem(slot, target, reduction_op="add" if add else None)


def _store_some_rows(acc: list[jax.Array], slot, out, row, column, begin, end) -> None:
    """Rows from `begin` to before `end`, fewer than all, at a group's edge.

    A copy has a fixed size: there is one for each power of two, and those that make up
    the number of rows are taken.
    """
    wg_m, piece = acc[0].shape
    width = _EDGE_BYTES // jnp.dtype(out.dtype).itemsize
    assert piece % width == 0
    for i in range(len(acc) * piece // width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        source, start = divmod(i * width, piece)
        slot[...] = acc[source][:, start : start + width].astype(out.dtype)
        plgpu.commit_smem()
        columns = pl.ds(column + i * width, width)
        first, size = begin, wg_m // 2
        while size:
            taken = (end - begin) & size

            @pl.when(taken != 0)
            def _copy(first=first, size=size, columns=columns):
                plgpu.copy_smem_to_gmem(
                    slot.at[pl.ds(first, size)],
                    out.at[pl.ds(row + first, size), columns],
                )

            first, size = first + taken, size // 2
