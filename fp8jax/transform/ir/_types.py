"""What jaxprs are made of, for annotations."""

from typing import TypeAlias, cast

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

AnyJaxpr: TypeAlias = Jaxpr | ClosedJaxpr  # One class since JAX 0.12.
Atom: TypeAlias = Var | Literal  # What an equation reads, and a jaxpr returns.


def aval_of(x: Atom) -> ShapedArray:
    """The type of an array in a jaxpr.

    JAX declares `AbstractValue`, for tokens and references stand in jaxprs, too: this
    is for what is known to be an array.
    """
    return cast(ShapedArray, x.aval)
