"""Which numbers of an FP8 weight a scale is of, told by the shapes of both."""

import math
from typing import Literal

import numpy as np

from fp8jax import numerics

Scheme = Literal["blocks", "per channel", "per tensor"]

_CONTRACTION = 128  # Along which products are promoted: a scale is repeated so often.


def scheme_of(
    shape: tuple[int, ...], scale: tuple[int, ...], tile: numerics.Tile
) -> tuple[Scheme, numerics.Tile] | None:
    """How a scale `scale` is of a weight `shape`, and the tiles that it stands for.

    One scale for each output channel, as of llm-compressor's FP8_DYNAMIC, fbgemm,
    GLM-4.5 and Llama 4, is one of tiles 1x128, repeated; one for a matrix, as of
    ModelOpt, AutoFP8 and Ministral, one of 128x128 blocks: the same numbers, in tiles
    that products take.

    Args:
        shape: `[*batch, m, k]`.
        scale: of what is stored: by blocks; `[*batch, m, 1]` or `[*batch, m]`; or
            `[*batch]`, perhaps with sides of one.
        tile: of blocks.

    Returns:
        None if it is none of these.
    """
    *batch, m, _ = shape
    if scale == numerics.scale_shape(shape, tile):
        return "blocks", tile
    if m > 1 and scale in ((*batch, m, 1), (*batch, m)):
        return "per channel", (1, _CONTRACTION)
    ones = scale[len(batch) :]
    if scale[: len(batch)] == tuple(batch) and len(ones) <= 2 and math.prod(ones) == 1:
        return "per tensor", (_CONTRACTION, _CONTRACTION)
    return None


def in_tiles(
    scale: np.ndarray, scheme: Scheme, shape: tuple[int, ...], tile: numerics.Tile
) -> np.ndarray:
    """The scales of every tile: a view that repeats those that are stored."""
    if scheme == "blocks":
        return scale
    *batch, m, _ = shape
    rows = m if scheme == "per channel" else 1
    return np.broadcast_to(
        scale.reshape(*batch, rows, 1), numerics.scale_shape(shape, tile)
    )
