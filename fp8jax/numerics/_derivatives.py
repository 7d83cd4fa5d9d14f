"""Rounding to FP8 is a step function: its derivative would be silently zero.

JAX gives FP8 codes cotangents that are FP8 themselves, without a scale: those of a mean
loss are all zero. So what makes or reads codes refuses to be differentiated.
"""

from collections.abc import Callable
from typing import Any

import jax


def refuse_derivatives(fn: Callable[..., Any], message: str) -> Callable[..., Any]:
    """`fn` of arrays, which raises TypeError with `message` when differentiated.

    It is silent where no argument is differentiated: inside of a function that is,
    constants and what comes of `jax.lax.stop_gradient` may be quantized.
    """

    @jax.custom_jvp
    def run(*args: Any) -> Any:
        return fn(*args)

    @run.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(message)

    return run


def no_derivative(name: str) -> str:
    """What to say of a function that makes or reads codes."""
    return (
        f"{name} has no derivative: rounding to FP8 is a step function, and JAX's "
        "cotangents of FP8 codes are FP8 without a scale, silently zero. Differentiate "
        "fp8jax.dot_general, fp8jax.ragged_dot or a layer, whose gradients are "
        "products in FP8 themselves, or fp8jax.fake_quantize, which gives quantized "
        "values with a straight-through gradient; or make a constant of the operand "
        "by jax.lax.stop_gradient."
    )
