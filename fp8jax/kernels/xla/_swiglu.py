"""SwiGLU and its gradient, quantized, in `jnp`."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import numerics
from fp8jax.kernels import _swiglu
from fp8jax.kernels._contract import Directions
from fp8jax.kernels.xla._quantize import in_directions


def quantize_swiglu(gate: jax.Array, up: jax.Array, **how: Any) -> tuple[Directions]:
    """FP8 of `silu(gate) * up`; see `fp8jax.kernels.QuantizeSwiglu`."""
    (h,) = _rounded(_swiglu.swiglu, gate, up)
    return (in_directions(h, **how),)


def quantize_swiglu_gradient(
    dh: jax.Array, gate: jax.Array, up: jax.Array, **how: Any
) -> tuple[Directions, Directions]:
    """FP8 of the gradients; see `fp8jax.kernels.QuantizeSwigluGradient`."""
    dgate, dup = _rounded(_swiglu.swiglu_gradient, gate, up, dh)
    return in_directions(dgate, **how), in_directions(dup, **how)


def _rounded(compute: Any, *inputs: jax.Array) -> list[jax.Array]:
    """`compute` in float32, with its results rounded to the inputs' dtype."""
    values = compute(*(x.astype(jnp.float32) for x in inputs))
    return [numerics.round_to(value, inputs[0].dtype) for value in values]
