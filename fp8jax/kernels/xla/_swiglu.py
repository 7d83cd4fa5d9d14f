"""SwiGLU and its gradient, quantized, in `jnp`."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import numerics
from fp8jax.kernels import _swiglu
from fp8jax.kernels._contract import Directions
from fp8jax.kernels.xla._quantize import quantize


def quantize_swiglu(gate: jax.Array, up: jax.Array, **how: Any) -> tuple[Directions]:
    """FP8 of `silu(gate) * up`; see `fp8jax.kernels.QuantizeSwiglu`."""
    (h,) = _rounded(_swiglu.swiglu, gate, up)
    return (_in_directions(h, **how),)


def quantize_swiglu_gradient(
    dh: jax.Array, gate: jax.Array, up: jax.Array, **how: Any
) -> tuple[Directions, Directions]:
    """FP8 of the gradients; see `fp8jax.kernels.QuantizeSwigluGradient`."""
    dgate, dup = _rounded(_swiglu.swiglu_gradient, gate, up, dh)
    return _in_directions(dgate, **how), _in_directions(dup, **how)


def _rounded(compute: Any, *inputs: jax.Array) -> list[jax.Array]:
    """`compute` in float32, with its results rounded to the inputs' dtype."""
    values = compute(*(x.astype(jnp.float32) for x in inputs))
    return [numerics.round_to(value, inputs[0].dtype) for value in values]


def _in_directions(
    x: jax.Array,
    *,
    tile: numerics.Tile | None,
    tile_t: numerics.Tile | None,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> Directions:
    along, across = (
        tiles
        and quantize(
            x, tile=tiles, dtype=dtype, scale=scale, eps=eps, transposed=transposed
        )
        for tiles, transposed in ((tile, False), (tile_t, True))
    )
    return along, across
