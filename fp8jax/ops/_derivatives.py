"""Rounding to FP8 is a step function: its derivative would be silently zero."""

from collections.abc import Callable
from typing import Any

import jax


def refuse_derivatives(fn: Callable[..., Any], message: str) -> Callable[..., Any]:
    """`fn` of arrays, which raises TypeError with `message` when differentiated."""

    @jax.custom_jvp
    def run(*args: Any) -> Any:
        return fn(*args)

    @run.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(message)

    return run
