"""The quantized array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch, numerics

_DEQUANTIZE = "QTensor.dequantize"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """FP8 codes and their scales: `x ~= data * scale`, the scale of the code's tile.

    Invariants (of the array it stands for, leading batch dimensions first):

        data.shape  == (*batch, m, k)
        scale.shape == (*batch, ceil(m / tile[0]), ceil(k / tile[1]))
        data.dtype in (float8_e4m3fn, float8_e5m2)
        scale.dtype == float32, and every scale > 0 or NaN

    A pytree with leaves `data` and `scale`; `tile` is static. Transformations may hold
    anything in the leaves (shardings, axes, avals), so nothing is checked on
    construction: functions that take a QTensor call `check`.

    Attributes:
        data: codes.
        scale: dequantization multipliers, in units of `x` per unit of `data`.
        tile: sides of the tile, over the last two dimensions.
    """

    data: jax.Array
    scale: jax.Array
    tile: numerics.Tile = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self):
        """The FP8 dtype of the codes."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(x.size * x.dtype.itemsize for x in (self.data, self.scale))

    @property
    def T(self) -> "QTensor":
        """The transposed matrix (of each batch entry): the same codes and scales."""
        rows, columns = self.tile
        return QTensor(self.data.mT, self.scale.mT, (columns, rows))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """`data * scale`, computed in float32 and rounded to `dtype`.

        The scale may be differentiated; TypeError if the codes are.
        """
        self.check(_DEQUANTIZE)
        return _decode(self.data, self.scale, tile=self.tile, dtype=np.dtype(dtype))

    def check(self, name: str) -> None:
        """Raises ValueError, on behalf of the function `name`, if one fails."""
        if not numerics.is_fp8(self.data.dtype) or self.scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} takes a QTensor of FP8 data and float32 scale, got "
                f"{self.data.dtype} and {self.scale.dtype}."
            )
        if self.ndim < 2:
            raise ValueError(
                f"{name} takes a QTensor of two dimensions or more, got "
                f"data.shape={self.shape}."
            )
        expected = numerics.scale_shape(self.shape, self.tile)
        if self.scale.shape != expected:
            raise ValueError(
                f"{name} got a QTensor with data.shape={self.shape} in tiles of "
                f"{self.tile} and scale.shape={self.scale.shape}; allowed: {expected}."
            )

    def __repr__(self) -> str:
        # Leaves may be anything while a transformation holds the tree.
        shape = getattr(self.data, "shape", None)
        dtype = getattr(self.data, "dtype", None)
        if shape is None or dtype is None or not hasattr(self.scale, "dtype"):
            return f"QTensor(data={self.data}, scale={self.scale}, tile={self.tile})"
        return (
            f"QTensor(shape={tuple(shape)}, tile={self.tile}, dtype={dtype}, "
            f"nbytes={self.nbytes})"
        )


def _decode_array(
    data: jax.Array, scale: jax.Array, *, tile: numerics.Tile, dtype: np.dtype
) -> jax.Array:
    def decode(data: jax.Array, scale: jax.Array) -> jax.Array:
        tiles = numerics.split_tiles(data, tile)
        values = numerics.decode_tiles(tiles, scale)
        return numerics.join_tiles(values, data.shape).astype(dtype)

    data = _dispatch.undifferentiated(_DEQUANTIZE, data)
    for _ in data.shape[:-2]:
        decode = jax.vmap(decode)
    return decode(data, scale)


_decode = _dispatch.marked("decode", _decode_array, static_argnames=("tile", "dtype"))
