"""Fine-grained quantization of a matrix, one way or both, and of rows in groups."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.kernels._contract import Directions, Quantized, ScaleKind, Tile
from fp8jax.kernels._grouped import rows_apart
from fp8jax.kernels.mosaic_gpu._blocks import quantize_blocks
from fp8jax.kernels.mosaic_gpu._blocks_values import Direction, Format, Values
from fp8jax.kernels.mosaic_gpu._encode import BLOCK, check_arguments

_ROW, _COLUMN, _BOX = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)


def quantize(
    x: jax.Array,
    *,
    tile: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
    transposed: bool = False,
) -> Quantized:
    r"""`x [m, k]` to FP8 codes and one float32 scale a tile, in one pass.

    $$s = \max(\max(amax, eps) \cdot q_{max}^{-1}, 2^{-126}), \quad
    data = rne(x / s)$$

    with s rounded up to a power of two for `scale="pow2"`; 1 for a tile of zeros, NaN
    for a tile with a NaN or an infinity. Sides that are no multiple of 128 (k) or 8
    (m; 128 for tiles of 128 rows) cost a zero-padded copy.

    Args:
        x: bfloat16, float16 or float32 [m, k].
        tile: (1, 128), (128, 1) or (128, 128). For (128, 1) the kernel writes the codes
            as [k, m]; the transpose back is free where the caller transposes again.
        dtype: float8_e4m3fn or float8_e5m2.
        scale: "pow2" or "fp32".
        eps: floor of amax, in units of x.
        transposed: whether x.T is what is quantized, x being read as it lies.

    Returns:
        Codes [m, k] and scales [ceil(m / tile[0]), ceil(k / tile[1])]; of x.T, with
        the sides exchanged, where `transposed`.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tile = (tile[0], tile[1])
    check_arguments("quantize", (x,), {"tile": tile}, (_ROW, _COLUMN, _BOX), dtype)
    fmt = Format(jnp.dtype(dtype), scale, eps)
    if tile == _COLUMN:
        ((data, factor),) = _quantize(x, fmt, Direction(_ROW, not transposed))
        return data.T, factor.T
    return _quantize(x, fmt, Direction(tile, transposed))[0]


def quantize_both(
    x: jax.Array,
    *,
    tile: Tile,
    tile_t: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Quantized, Quantized]:
    """`quantize` of `x [m, k]` and of `x.T`, bit for bit, in one read of x.

    Args:
        x: bfloat16, float16 or float32 [m, k].
        tile: (1, 128) or (128, 128), of x.
        tile_t: (1, 128) or (128, 128), of x.T. With (128, 128) for both, the second
            codes and scales are the transpose of the first.
        dtype, scale, eps: as in `quantize`.

    Returns:
        Codes [m, k] and their scales, then codes [k, m] and theirs.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tiles = {"tile": tile, "tile_t": tile_t}
    check_arguments("quantize_both", (x,), tiles, (_ROW, _BOX), dtype)
    directions = (
        Direction((tile[0], tile[1]), False),
        Direction((tile_t[0], tile_t[1]), True),
    )
    fmt = Format(jnp.dtype(dtype), scale, eps)
    along, across = _quantize(x, fmt, *directions)
    return along, across


def quantize_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    *,
    tile: Tile | None,
    tile_t: Tile,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> Directions:
    """`quantize` of `x [m, k]`, and of x.T with every group in columns of its own.

    XLA first moves the rows apart, so that no block holds rows of two groups: a copy of
    up to `m + 127 g` rows. Groups that begin at multiples of 128 need none: for those
    `quantize_both` has the same bits.

    Args:
        x: bfloat16, float16 or float32 [m, k], the first group's rows first.
        group_sizes: int32 [g], in device memory; their sum is at most m.
        tile: (1, 128) or (128, 128), of x; None to leave it out.
        tile_t: (1, 128) or (128, 128), of x.T.
        dtype, scale, eps: as in `quantize`.

    Returns:
        Codes [m, k] and their scales, or None; codes [k, c] and theirs, with c as
        `fp8jax.kernels.QuantizeGrouped` has it.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tiles = {"tile": tile, "tile_t": tile_t}
    check_arguments("quantize_grouped", (x,), tiles, (_ROW, _BOX), dtype)
    how: Any = {"dtype": dtype, "scale": scale, "eps": eps}
    apart = rows_apart(x, group_sizes, BLOCK)
    across = quantize(apart, tile=tile_t, **how, transposed=True)
    return None if tile is None else quantize(x, tile=tile, **how), across


def _quantize(
    x: jax.Array, fmt: Format, *directions: Direction
) -> tuple[Quantized, ...]:
    op = "quantize" if len(directions) == 1 else "quantize_both"
    (out,) = quantize_blocks((x,), Values(op, None, (x.dtype,), (directions,)), fmt)
    return out
