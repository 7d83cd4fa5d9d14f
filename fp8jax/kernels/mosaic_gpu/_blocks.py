"""Matrices quantized in one pass: padding, batches, and what the kernel wrote, cut."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fp8jax.kernels._contract import Directions, Quantized, Tile
from fp8jax.kernels.mosaic_gpu._blocks_config import BlocksConfig, blocks_config
from fp8jax.kernels.mosaic_gpu._blocks_kernel import launch
from fp8jax.kernels.mosaic_gpu._blocks_values import (
    ROW,
    Compute,
    Direction,
    Format,
    Values,
)
from fp8jax.kernels.mosaic_gpu._common import (
    ceil_div,
    in_32_bits,
    mapped_under_vmap,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._encode import BLOCK


def quantize_directions(
    op: str,
    inputs: Sequence[jax.Array],
    compute: Compute,
    dtypes: Sequence[np.dtype],
    tiles: Sequence[tuple[Tile | None, Tile | None]],
    fmt: Format,
    vectors: Sequence[tuple[jax.Array, int]] = (),
) -> tuple[Directions, ...]:
    """`quantize_blocks` of computed values and of their transposes, where asked for.

    Args:
        op: the name of the op that asks.
        inputs, fmt: as there.
        compute, dtypes: of the values, as in `Values`.
        tiles: for each value, those of it and of its transpose, None to leave one out.
        vectors: each with the side that it lies along, as in `Values`.
    """
    ways = tuple(
        tuple(
            Direction((tile[0], tile[1]), transposed)
            for tile, transposed in zip(both, (False, True), strict=True)
            if tile is not None
        )
        for both in tiles
    )
    sides = tuple(side for _, side in vectors)
    values = Values(op, compute, tuple(dtypes), ways, sides)
    found = quantize_blocks(inputs, values, fmt, [vector for vector, _ in vectors])
    out = []
    for value, both in zip(found, tiles, strict=True):
        given = iter(value)
        along, across = (None if tile is None else next(given) for tile in both)
        out.append((along, across))
    return tuple(out)


def quantize_blocks(
    inputs: Sequence[jax.Array],
    values: Values,
    fmt: Format,
    vectors: Sequence[jax.Array] = (),
) -> tuple[tuple[Quantized, ...], ...]:
    """Quantizes each of the values in each of its directions, in one pass.

    Sides that are no multiple of 128 (k) or 8 (m; 128 where codes leave transposed)
    cost a zero-padded copy of the inputs.

    Args:
        inputs: matrices [m, k], bfloat16, float16 or float32; of several dtypes only
            where values are computed.
        values: what is quantized; at most as many as there are inputs.
        fmt: of the codes.
        vectors: float32 [m] or [k], as `values.sides` says.

    Returns:
        For every value, for every direction, codes [m, k] (transposed: [k, m]) and
        their scales, one a tile.
    """
    run = functools.partial(quantize_padded, values=values, fmt=fmt)
    every = itertools.chain(*values.directions)
    by_rows = all(d == Direction(ROW, False) for d in every)

    def of_stacked(count: int) -> Any:
        """The call for so many matrices, one below the other, and so their codes."""

        def fold(*batches: jax.Array) -> Any:
            if vectors:
                return None  # Each matrix has its own.
            (b, m, k), every = batches[0].shape, len(batches[0]) * count
            one = m // count
            # No tile spans two matrices.
            multiple = 1 if by_rows else BLOCK
            apart = (
                zero_pad(x.reshape(every, one, k), (1, multiple, 1)) for x in batches
            )
            folded = of_stacked(every)(*(x.reshape(-1, k) for x in apart))

            def cut(codes: Quantized, d: Direction) -> Quantized:
                sides = (k, one) if d.transposed else (one, k)
                codes = _without_padding(*codes, d.tile, sides, every)
                return codes[0].reshape(b, -1, sides[1]), codes[1].reshape(
                    b, -1, codes[1].shape[-1]
                )

            return tuple(
                tuple(map(cut, several, directions))
                for several, directions in zip(folded, values.directions, strict=True)
            )

        return mapped_under_vmap(functools.partial(run, stacked=count), fold)

    return of_stacked(1)(*inputs, *vectors)


@in_32_bits
def quantize_padded(
    *arrays: jax.Array,
    values: Values,
    fmt: Format,
    config: BlocksConfig | None = None,
    stacked: int = 1,
) -> tuple[tuple[Quantized, ...], ...]:
    """`quantize_blocks` with a configuration of one's own choice.

    Of several matrices `stacked` one below the other, codes that leave transposed are
    stacked so, too: where any does, or a tile has 128 rows, each has whole blocks.

    Pads to what the copies need, launches, and cuts the padding off again.
    """
    count = len(arrays) - len(values.sides)
    inputs, vectors = arrays[:count], arrays[count:]
    m, k = inputs[0].shape
    directions = [*itertools.chain(*values.directions)]
    # The copies move whole rows of 8 and whole blocks of columns; transposed codes
    # have m as their contiguous side.
    multiple = BLOCK if any(d.transposed for d in directions) else 8
    inputs = tuple(zero_pad(x, (multiple, BLOCK)) for x in inputs)
    vectors = tuple(zero_pad(x, (BLOCK,)) for x in vectors)
    if config is None:
        places = values.places([x.dtype for x in inputs])
        config = blocks_config(
            itemsizes=[x.dtype.itemsize for x in inputs],
            outputs=len(directions),
            computed=values.compute is not None,
            kept=[place for place in places if place is not None],
            own=sum(
                dtype.itemsize
                for dtype, place in zip(values.dtypes, places, strict=True)
                if place is None
            ),
        )
    outputs = launch(inputs, vectors, values, fmt, config=config, stacked=stacked)
    cut = iter(
        [
            _cut(data, scale, d.tile, (k, m // stacked), stacked)
            if d.transposed
            else _cut(data, scale, d.tile, (m, k))
            for data, scale, d in zip(
                outputs[::2], outputs[1::2], directions, strict=True
            )
        ]
    )
    return tuple(tuple(next(cut) for _ in several) for several in values.directions)


def _cut(
    data: jax.Array,
    scale: jax.Array,
    tile: Tile,
    shape: tuple[int, int],
    stacked: int = 1,
) -> Quantized:
    """What the kernel wrote, without the padding and with scales one a tile."""
    if tile == ROW:
        scale = scale.T  # The kernel wrote [columns / 128, rows].
    return _without_padding(data, scale, tile, shape, stacked)


def _without_padding(
    data: jax.Array, scale: jax.Array, tile: Tile, shape: tuple[int, int], stacked: int
) -> Quantized:
    """Codes and scales of matrices of a shape, stacked, of codes of larger ones."""
    rows, columns = shape
    scales = ceil_div(rows, tile[0]), ceil_div(columns, tile[1])
    return _sliced(data, shape, stacked), _sliced(scale, scales, stacked)


def _sliced(x: jax.Array, shape: tuple[int, int], stacked: int) -> jax.Array:
    """The first of the rows and columns of each of the matrices in x."""
    rows, columns = shape
    if stacked == 1:
        return x[:rows, :columns]
    each = x.reshape(stacked, -1, x.shape[-1])[:, :rows, :columns]
    return each.reshape(stacked * rows, columns)
