"""Quantization of a shard whose edges cut tiles of the whole array."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import numerics
from fp8jax.ops._partition import Factors
from fp8jax.quant import QuantSpec


def quantize_cut(
    x: jax.Array,
    names: Factors,
    in_tiles: Mapping[str, int],
    spec: QuantSpec,
    sizes: Mapping[str, int],
    cut: Mapping[str, tuple[str, ...]],
) -> tuple[jax.Array, jax.Array]:
    """Codes of a shard, and the whole array's scales along each side that is cut.

    Numbers are those of the whole array: the largest magnitudes of tiles are put
    together over the devices that hold parts of them.

    Args:
        x: the shard.
        names: of its dimensions.
        in_tiles: the length of tiles along some of them.
        spec: the codes' format and the kind of scale.
        sizes: of the whole array.
        cut: the mesh axes that split each dimension whose tiles are cut.
    """
    cuts = [
        _Cut(d, x.shape[d], in_tiles[name], sizes[name], cut.get(name, ()))
        for d, name in enumerate(names)
        if name in in_tiles
    ]
    amax = x.astype(jnp.float32)
    for part in cuts:
        amax = part.largest(amax)
    axes = [axis for name in in_tiles for axis in cut.get(name, ())]
    if axes:
        # As integers, in whose order NaN is the largest: maxima of floats may drop it.
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        amax = lax.bitcast_convert_type(lax.pmax(bits, tuple(axes)), jnp.float32)
    for part in cuts:
        amax = part.without_beyond(amax)
    scale = numerics.scale_from_amax(amax, spec.dtype, spec.scale, spec.eps)
    each = scale
    for part in cuts:
        each = part.of_each(each)
    # NOTE: as in `kernels.xla.quantize`, or XLA:GPU may drop the cast and its inverse.
    return lax.optimization_barrier((numerics.encode(x, each, spec.dtype), scale))


class _Cut:
    """One dimension of a shard as tiles of the whole array's.

    Args:
        dim: which.
        size: of the shard.
        side: of a tile.
        whole: size of the whole array.
        axes: the mesh axes that split it, none if the shard begins with a tile.
    """

    def __init__(
        self, dim: int, size: int, side: int, whole: int, axes: tuple[str, ...]
    ):
        self._dim, self._size, self._side, self._axes = dim, size, side, axes
        begin = lax.axis_index(axes) * size if axes else 0
        self._first, self._phase = begin // side, begin % side  # Tile, place in it.
        # Tiles that a shard of this size can meet, wherever it begins.
        self._met = -(-(size + (side - 1 if axes else 0)) // side)
        self._tiles = -(-whole // side) if axes else self._met

    def largest(self, x: jax.Array) -> jax.Array:
        """The shard's largest magnitude in each tile, of the whole array if it is cut.

        There the last shard may meet fewer tiles than others: with a place for those.
        """
        x = self._put(x, self._met * self._side, self._phase)
        d = self._dim
        shape = (*x.shape[:d], self._met, self._side, *x.shape[d + 1 :])
        amax = lax.squeeze(numerics.integer_amax(x.reshape(shape), (d + 1,)), (d + 1,))
        if not self._axes:
            return amax
        return self._put(amax, self._tiles + self._met, self._first)

    def without_beyond(self, amax: jax.Array) -> jax.Array:
        """Drops the place for tiles beyond the last."""
        return lax.slice_in_dim(amax, 0, self._tiles, axis=self._dim)

    def of_each(self, scale: jax.Array) -> jax.Array:
        """The scale of each number of the shard."""
        d = self._dim
        if self._axes:
            scale = self._put(scale, self._tiles + self._met, 0)
            scale = lax.dynamic_slice_in_dim(scale, self._first, self._met, d)
        each = jnp.repeat(scale, self._side, axis=d)
        return lax.dynamic_slice_in_dim(each, self._phase, self._size, d)

    def _put(self, x: jax.Array, size: int, at: int | jax.Array) -> jax.Array:
        """Zeros of that size with `x` in them, beginning at a place."""
        shape = [*x.shape]
        shape[self._dim] = size
        zeros = jnp.zeros(shape, x.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, x, at, self._dim)
