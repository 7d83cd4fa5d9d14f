"""Matrices quantized in one pass: padding, batches, and what the kernel wrote, cut."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from fp8jax.kernels._contract import Quantized, Tile
from fp8jax.kernels.mosaic_gpu._blocks_config import BlocksConfig, blocks_config
from fp8jax.kernels.mosaic_gpu._blocks_kernel import (
    ROW,
    Compute,
    Direction,
    Format,
    launch,
)
from fp8jax.kernels.mosaic_gpu._common import (
    ceil_div,
    in_32_bits,
    mapped_under_vmap,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._encode import BLOCK


def quantize_blocks(
    inputs: Sequence[jax.Array],
    directions: tuple[Direction, ...],
    fmt: Format,
    *,
    compute: Compute | None = None,
    values: int = 1,
) -> tuple[tuple[Quantized, ...], ...]:
    """Quantizes each of `compute(*inputs)` in each direction, in one pass.

    Sides that are no multiple of 128 (k) or 8 (m; 128 where codes leave transposed)
    cost a zero-padded copy of the inputs.

    Args:
        inputs: matrices [m, k] of one dtype, bfloat16, float16 or float32.
        directions: at least one.
        fmt: of the codes.
        compute: float32 pieces of the inputs to as many of the values, elementwise;
            None for the input itself.
        values: how many matrices `compute` gives, at most as many as it takes.

    Returns:
        For every value, for every direction, codes [m, k] (transposed: [k, m]) and
        their scales, one a tile.
    """
    run = functools.partial(
        quantize_padded, directions=directions, fmt=fmt, compute=compute, values=values
    )
    by_rows = all(d == Direction(ROW, False) for d in directions)

    def of_stacked(count: int) -> Any:
        """The call for so many matrices, one below the other, and so their codes."""

        def fold(*batches: jax.Array) -> Any:
            b, m = batches[0].shape[:2]
            if not by_rows and m // count % BLOCK:
                return None  # A tile would span two matrices.
            folded = of_stacked(b * count)(*(x.reshape(b * m, -1) for x in batches))
            return jax.tree.map(lambda x: x.reshape(b, -1, x.shape[-1]), folded)

        return mapped_under_vmap(functools.partial(run, stacked=count), fold)

    return of_stacked(1)(*inputs)


@in_32_bits
def quantize_padded(
    *inputs: jax.Array,
    directions: tuple[Direction, ...],
    fmt: Format,
    compute: Compute | None,
    values: int,
    config: BlocksConfig | None = None,
    stacked: int = 1,
) -> tuple[tuple[Quantized, ...], ...]:
    """`quantize_blocks` with a configuration of one's own choice.

    Of several matrices `stacked` one below the other, codes that leave transposed are
    stacked so, too: where any does, or a tile has 128 rows, each has whole blocks.

    Pads to what the copies need, launches, and cuts the padding off again.
    """
    m, k = inputs[0].shape
    # The copies move whole rows of 8 and whole blocks of columns; transposed codes
    # have m as their contiguous side.
    multiple = BLOCK if any(d.transposed for d in directions) else 8
    inputs = tuple(zero_pad(x, (multiple, BLOCK)) for x in inputs)
    if config is None:
        config = blocks_config(
            inputs=len(inputs),
            itemsize=inputs[0].dtype.itemsize,
            outputs=values * len(directions),
            boxes=any(d.tile != ROW for d in directions),
        )
    outputs = launch(
        inputs,
        directions,
        fmt,
        compute=compute,
        values=values,
        config=config,
        stacked=stacked,
    )
    cut = [
        _cut(data, scale, d.tile, (k, m // stacked), stacked)
        if d.transposed
        else _cut(data, scale, d.tile, (m, k))
        for data, scale, d in zip(
            outputs[::2], outputs[1::2], directions * values, strict=True
        )
    ]
    n = len(directions)
    return tuple(tuple(cut[i : i + n]) for i in range(0, len(cut), n))


def _cut(
    data: jax.Array,
    scale: jax.Array,
    tile: Tile,
    shape: tuple[int, int],
    stacked: int = 1,
) -> Quantized:
    """What the kernel wrote, without the padding and with scales one a tile."""
    rows, columns = shape
    if tile == ROW:
        scale = scale.T  # The kernel wrote [columns / 128, rows].
    scales = ceil_div(rows, tile[0]), ceil_div(columns, tile[1])
    return _sliced(data, shape, stacked), _sliced(scale, scales, stacked)


def _sliced(x: jax.Array, shape: tuple[int, int], stacked: int) -> jax.Array:
    """The first of the rows and columns of each of the matrices in x."""
    rows, columns = shape
    if stacked == 1:
        return x[:rows, :columns]
    each = x.reshape(stacked, -1, x.shape[-1])[:, :rows, :columns]
    return each.reshape(stacked * rows, columns)
