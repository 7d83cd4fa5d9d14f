"""Gradients of the inputs of products by weights stored in FP8, as under adapters."""

from collections.abc import Callable
from typing import Any

import jax

from fp8jax import numerics
from fp8jax.ops._product import ONE_DERIVATIVE
from fp8jax.ops._varying import vary_alike
from fp8jax.quant import QTensor


def with_input_gradient(
    name: str, run: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`run` of arrays and then QTensors, with a gradient of the arrays.

    Args:
        name: of the function that errors are about.
        run: `run(*arrays, *kernels)`.
        backward: gives the arrays' cotangents of `(arrays, kernels, cotangents)`.

    Returns:
        The function. It raises TypeError where codes are differentiated, a QTensor's
        among the arrays, too, or a gradient is.
    """
    message = ONE_DERIVATIVE.format(name=f"{name} with a QTensor kernel")

    @jax.custom_vjp
    def product(arrays: Any, kernels: Any) -> Any:
        return run(*arrays, *kernels)

    def forward(arrays: Any, kernels: Any) -> tuple[Any, Any]:
        once = numerics.refuse_derivatives(run, message)
        return once(*arrays, *kernels), (arrays, kernels)

    def gradient(kept: Any, douts: Any) -> tuple[Any, None]:
        once = numerics.refuse_derivatives(backward, message)
        return once(*kept, douts), None

    product.defvjp(forward, gradient)

    def differentiable(*args: Any) -> Any:
        constants = [x for x in args if isinstance(x, QTensor)]
        left = iter(_constant(name, constants))
        args = tuple(next(left) if isinstance(x, QTensor) else x for x in args)
        first = [isinstance(x, QTensor) for x in (*args, *constants[:1])].index(True)
        args = vary_alike(args)
        return product(args[:first], args[first:])

    return differentiable


def _constant(name: str, constants: list[QTensor]) -> list[QTensor]:
    """The same QTensors; TypeError if they are differentiated."""
    message = (
        f"{name} with a QTensor has no gradient of that QTensor's codes: rounding to "
        "FP8 is a step function. Differentiate what is trained beside it, such as "
        "adapters, or train with an array in its place."
    )
    return numerics.refuse_derivatives(lambda *x: list(x), message)(*constants)
