"""How an array is quantized: tile, format and kind of scale."""

import dataclasses
import math
import operator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import numerics


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """One operand's quantization. Hashable, so it may be a static argument of `jit`.

    Attributes:
        tile: sides `(rows, columns)` of the tile that shares a scale.
        dtype: FP8 dtype of the codes, `float8_e4m3fn` or `float8_e5m2`.
        scale: `"pow2"`, rounded up to a power of two, or `"fp32"`.
        eps: floor of a tile's largest magnitude, in units of the array. Zero by
            default: a floor of 1e-4, common for inference, zeroes gradients of that
            size.

    Raises:
        ValueError: If a field is none of the above.
    """

    tile: numerics.Tile = (1, 128)
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn
    scale: numerics.ScaleKind = "pow2"
    eps: float = 0.0

    def __post_init__(self):
        try:
            sides = tuple(operator.index(side) for side in self.tile)
        except TypeError:
            sides = ()
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(
                f"QuantSpec takes a tile of two positive integers, got {self.tile!r}."
            )
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            dtype = None
        if dtype not in numerics.FP8_DTYPES:
            allowed = ", ".join(str(d) for d in numerics.FP8_DTYPES)
            raise ValueError(
                f"QuantSpec takes a dtype of {allowed}, got {self.dtype!r}."
            )
        if self.scale not in get_args(numerics.ScaleKind):
            raise ValueError(
                f"QuantSpec takes scale='pow2' or 'fp32', got {self.scale!r}."
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"QuantSpec takes a finite eps >= 0, got {self.eps!r}.")
        # One spelling of a field, so that equal specs compare and hash as equal.
        object.__setattr__(self, "tile", sides)
        object.__setattr__(self, "dtype", dtype)

    @property
    def T(self) -> "QuantSpec":
        """The spec that quantizes a transposed matrix to the same bits."""
        return dataclasses.replace(self, tile=self.tile[::-1])


TILE_1X128 = QuantSpec(tile=(1, 128))
TILE_128X1 = QuantSpec(tile=(128, 1))
BLOCK_128X128 = QuantSpec(tile=(128, 128))
