"""Values computed elementwise, quantized, in `jnp`."""

import jax

from fp8jax._elementwise import Elementwise
from fp8jax.kernels._contract import Directions, ScaleKind, Tile
from fp8jax.kernels.xla._quantize import in_directions


def quantize_map(
    *inputs: jax.Array,
    function: Elementwise,
    tiles: tuple[tuple[Tile | None, Tile | None], ...],
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Directions, ...]:
    """FP8 of the function's results; see `fp8jax.kernels.QuantizeMap`."""
    return tuple(
        in_directions(
            value,
            tile=tile,
            tile_t=tile_t,
            dtype=dtype,
            scale=scale,
            eps=eps,
        )
        for value, (tile, tile_t) in zip(function(*inputs), tiles, strict=True)
    )
