"""What the GEMM kernels take, and how its sides are padded for their copies."""

import jax
import jax.numpy as jnp

from fp8jax.kernels._contract import Tile
from fp8jax.kernels.mosaic_gpu._config import CHUNK
from fp8jax.kernels.mosaic_gpu._problem import GemmKind
from fp8jax.kernels.mosaic_gpu._schedule import ROW_MULTIPLE

ROW: Tile = (1, CHUNK)
BLOCK: Tile = (CHUNK, CHUNK)
# By the tile of the rhs. With a blocked lhs 1d2d makes the transposed product.
KINDS: dict[Tile, GemmKind] = {BLOCK: "1d2d", ROW: "1d1d"}

_OUT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32, jnp.float16)))
_FP8_DTYPES = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2)))

# What the stores need of the output's contiguous side: whole slices.
_COLUMN_MULTIPLE = 32
# NOTE: an output as narrow as one slice is stored wrongly: a slice beyond its edge is
# not cut off, as elsewhere, but lands on the first one (seen on a GPU with bfloat16 and
# 32 columns; interpret mode does not show it).
_FEWEST_COLUMNS = 64


def check_operands(
    name: str,
    lhs: jax.Array,
    rhs: jax.Array,
    tiles: tuple[Tile, Tile],
    allowed: tuple[tuple[Tile, Tile], ...],
    out_dtype: jax.typing.DTypeLike,
) -> tuple[Tile, Tile]:
    """The tiles as tuples of numbers, if the op `name` takes all of these.

    Raises:
        NotImplementedError: With what came and what is allowed.
    """
    lhs_tile, rhs_tile = ((tile[0], tile[1]) for tile in tiles)
    if (lhs_tile, rhs_tile) not in allowed:
        raise NotImplementedError(
            f"mosaic_gpu {name} takes (lhs_tile, rhs_tile) of {allowed}, got "
            f"({lhs_tile}, {rhs_tile})."
        )
    if lhs.dtype not in _FP8_DTYPES or lhs.dtype != rhs.dtype:
        raise NotImplementedError(
            f"mosaic_gpu {name} takes two operands of one dtype, float8_e4m3fn or "
            f"float8_e5m2, got {lhs.dtype} and {rhs.dtype}."
        )
    if jnp.dtype(out_dtype) not in _OUT_DTYPES:
        raise NotImplementedError(
            f"mosaic_gpu {name} returns bfloat16, float32 or float16, got "
            f"out_dtype={jnp.dtype(out_dtype)}."
        )
    return lhs_tile, rhs_tile


def stored_dtype(out_dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What the kernel stores for a result of `out_dtype`: it stores no float16."""
    return jnp.float32 if jnp.dtype(out_dtype) == jnp.float16 else out_dtype


def output_multiples(
    m: int, n: int, *, transposed: bool, fewest: int = _FEWEST_COLUMNS
) -> tuple[int, int]:
    """What m and n must be multiples of, for the output's stores.

    Args:
        m, n: sides of the product.
        transposed: whether it is stored as [n, m].
        fewest: columns that the output has at least.
    """
    contiguous = m if transposed else n
    columns = _COLUMN_MULTIPLE if contiguous > fewest else fewest
    return (columns, ROW_MULTIPLE) if transposed else (ROW_MULTIPLE, columns)
