"""Fine-grained quantization in `jnp`."""

import functools

import jax
from jax import lax

from fp8jax import numerics
from fp8jax.kernels._contract import Directions, Quantized


def quantize(
    x: jax.Array,
    *,
    tile: numerics.Tile,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
    transposed: bool = False,
) -> Quantized:
    """`x [m, k]` to FP8 codes `[m, k]` and float32 scales `[m_tiles, k_tiles]`.

    With `transposed`, what is quantized is x.T. See `fp8jax.kernels.Quantize`.
    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    x = x.T if transposed else x
    tiles = numerics.split_tiles(x, tile)  # [mt, tm, kt, tk]
    amax = numerics.integer_amax(tiles, axes=(1, 3))  # [mt, 1, kt, 1]
    factor = numerics.scale_from_amax(amax, dtype, scale, eps)
    data = numerics.join_tiles(numerics.encode(tiles, factor, dtype), x.shape)
    # NOTE: without the barrier XLA:GPU fuses a later `data.astype(float32)` with the
    # cast above and drops both as excess precision: nothing would be quantized.
    return lax.optimization_barrier((data, factor[:, 0, :, 0]))


def quantize_both(
    x: jax.Array,
    *,
    tile: numerics.Tile,
    tile_t: numerics.Tile,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> tuple[Quantized, Quantized]:
    """`quantize` of `x [m, k]` in tiles of `tile` and of `x.T` in those of `tile_t`.

    See `fp8jax.kernels.QuantizeBoth`. Source: DeepSeek-V3 Technical Report,
    arXiv:2412.19437, section 3.3.2.
    """
    run = functools.partial(quantize, dtype=dtype, scale=scale, eps=eps)
    return run(x, tile=tile), run(x, tile=tile_t, transposed=True)


def in_directions(
    x: jax.Array,
    *,
    tile: numerics.Tile | None,
    tile_t: numerics.Tile | None,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> Directions:
    """`quantize` of x in tiles of `tile`, and of x.T in those of `tile_t`."""
    along, across = (
        tiles
        and quantize(
            x, tile=tiles, dtype=dtype, scale=scale, eps=eps, transposed=transposed
        )
        for tiles, transposed in ((tile, False), (tile_t, True))
    )
    return along, across
