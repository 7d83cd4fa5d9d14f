"""Matrices as grids of tiles, the last row and column of which may be cut short."""

import jax
import jax.numpy as jnp

Tile = tuple[int, int]


def scale_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """The shape of the scales of an array: one entry a tile of its last two sides.

    `(576, 7168)` in tiles of `(128, 128)` has `(5, 56)` scales.
    """
    *batch, m, k = shape
    return (*batch, -(-m // tile[0]), -(-k // tile[1]))


def split_tiles(x: jax.Array, tile: Tile) -> jax.Array:
    """Zero-pads `x [m, k]` to whole tiles: `[m_tiles, tile_m, k_tiles, tile_k]`."""
    (m, k), (tm, tk) = x.shape, tile
    padded = jnp.pad(x, ((0, -m % tm), (0, -k % tk)))
    return padded.reshape(-(-m // tm), tm, -(-k // tk), tk)


def join_tiles(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `split_tiles`: drops the padding and returns `[m, k] = shape`."""
    mt, tm, kt, tk = tiles.shape
    return tiles.reshape(mt * tm, kt * tk)[: shape[0], : shape[1]]


def expand_scale(scale: jax.Array, side: int, tile_side: int) -> jax.Array:
    """Repeats each scale of one side over its tile: `[side_tiles]` to `[side]`."""
    if tile_side == 1:
        return scale
    return jnp.repeat(scale, tile_side)[:side]
