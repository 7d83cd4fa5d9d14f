"""What a function was given before it is called: models, and partial application."""

import types
from typing import Any

import jax
import numpy as np

from fp8jax._described import described
from fp8jax.transform.call._equinox import is_of_equinox
from fp8jax.transform.call._modules import has_modules


def check_function(fn: Any) -> None:
    """Raises ValueError, on behalf of `fp8_transform`, for what is no function."""
    kinds = {(cls.__module__, cls.__name__) for cls in type(fn).__mro__}
    if ("flax.linen.module", "Module") in kinds:
        name = type(fn).__name__
        raise ValueError(
            f"fp8_transform takes a function, got a Linen module, {name}, which is "
            "none of its variables: give it the module's apply, as "
            "fp8_transform(module.apply)(variables, x)."
        )
    if not callable(fn):
        raise ValueError(
            f"fp8_transform takes a function, got {described(fn)}: arrays are "
            "arguments of what it returns, fp8_transform(function)(params, ...)."
        )


def is_model(fn: Any) -> bool:
    """Whether a callable holds the arrays it computes with, as a pytree or by NNX."""
    if isinstance(fn, (type, types.FunctionType, types.BuiltinFunctionType)):
        return False
    # Equinox's own transformations are pytrees, too.
    if is_of_equinox(fn) and not type(fn).__module__.startswith("equinox.nn"):
        return False
    return has_modules(fn) or any(map(_is_array, jax.tree.leaves(fn)))


def holds_arrays(tree: Any) -> bool:
    """Whether what a function was given becomes an argument of each call.

    Python numbers do not: a function may branch on one that it was given for good.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(x, (bool, int, float, complex)) for x in leaves):
        return False
    return has_modules(tree) or any(map(_is_array, leaves))


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and x.ndim > 0
