"""SwiGLU and its gradient, computed and quantized in one read of what they take."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.kernels import _swiglu
from fp8jax.kernels._contract import Directions, ScaleKind, Tile
from fp8jax.kernels.mosaic_gpu._blocks import quantize_directions
from fp8jax.kernels.mosaic_gpu._blocks_values import Format
from fp8jax.kernels.mosaic_gpu._common import in_float32
from fp8jax.kernels.mosaic_gpu._encode import BLOCK, check_arguments

_TILES = ((1, BLOCK), (BLOCK, BLOCK))


def quantize_swiglu(gate: jax.Array, up: jax.Array, **how: Any) -> tuple[Directions]:
    r"""FP8 of `silu(gate) * up`, in one read of both.

    $$h = rne_{dtype(gate)}((g \, \sigma(g)) \, u)$$

    in float32, rounded once, and then `quantize` of h: what a pass that writes h and
    one that reads it give.

    Args:
        gate, up: bfloat16, float16 or float32 [m, k], of one dtype.
        how: as in `fp8jax.kernels.QuantizeSwiglu`.

    Returns:
        A tuple of one: codes of h [m, k] and scales, and of its transpose, each if
        asked for.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Error: h, before it is rounded, is off by at most (13 + 1.5 |g|) 2^-24, relatively:
    2^-22 of `ex2.approx` and 1.5 |g| 2^-24 of its argument, twice 2^-22.9 of
    `rsqrt.approx`, and four roundings. That is below a bfloat16's half ulp, 2^-9, for
    every g whose sigmoid is no subnormal. Beyond, h is -0 or as small; a large g gives
    g u, an infinite one of either sign or a NaN gives NaN or an infinity, and so NaN.
    """
    (h,) = _quantize("quantize_swiglu", _swiglu.swiglu, 1, (gate, up), **how)
    return (h,)


def quantize_swiglu_gradient(
    dh: jax.Array, gate: jax.Array, up: jax.Array, **how: Any
) -> tuple[Directions, Directions]:
    r"""FP8 of SwiGLU's two gradients, in one read of what they depend on.

    $$dg = dh \, u \, \sigma (1 + g (1 - \sigma)), \quad du = dh \, g \, \sigma$$

    in float32, each rounded once to the inputs' dtype, and then `quantize` of it.

    Args:
        dh, gate, up: bfloat16, float16 or float32 [m, k], of one dtype.
        how: as in `fp8jax.kernels.QuantizeSwigluGradient`.

    Returns:
        What `quantize_swiglu` returns, of dgate and of dup.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Error: dup as h in `quantize_swiglu`; dgate is within as much of |dh u| sigma
    (1 + |g|), whose last factor may cancel.
    """
    name, compute = "quantize_swiglu_gradient", _swiglu.swiglu_gradient
    dgate, dup = _quantize(name, compute, 2, (gate, up, dh), **how)
    return dgate, dup


def _quantize(
    name: str,
    compute: Any,
    values: int,
    inputs: tuple[jax.Array, ...],
    *,
    tile: Tile | None,
    tile_t: Tile | None,
    dtype: jax.typing.DTypeLike,
    scale: ScaleKind,
    eps: float,
) -> tuple[Directions, ...]:
    check_arguments(name, inputs, {"tile": tile, "tile_t": tile_t}, _TILES, dtype)
    return quantize_directions(
        name,
        inputs,
        in_float32(compute),
        [inputs[0].dtype] * values,
        [(tile, tile_t)] * values,
        Format(jnp.dtype(dtype), scale, eps),
    )
