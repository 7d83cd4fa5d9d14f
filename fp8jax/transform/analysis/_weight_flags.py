"""Finds the values of a program that depend on parameters alone."""

from collections.abc import Sequence

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir import AnyJaxpr, Construct, Input

Flags = tuple[bool, ...]  # For each input of a jaxpr.


def flagged(jaxpr: AnyJaxpr, is_weight: Sequence[bool]) -> set[Var]:
    """The inputs of a jaxpr that are flagged."""
    invars = _compat.open_jaxpr(jaxpr).invars
    return {v for v, known in zip(invars, is_weight, strict=True) if known}


def add_results(eqn: JaxprEqn, weights: set[Var]) -> None:
    """Adds an equation's results if all that it reads is among the weights."""
    operands = [x for x in eqn.invars if isinstance(x, core.Var)]
    if operands and all(x in weights for x in operands):
        weights.update(eqn.outvars)


def inner_flags(construct: Construct, weights: set[Var]) -> list[Flags]:
    """Flags of each body's inputs; a carry has its first value's."""

    def is_one(x: Input) -> bool:
        return not isinstance(x.operand, core.Var) or x.operand in weights

    return [
        tuple(is_one(x) for x in construct.inputs if x.inner[i] is not None)
        for i, _ in enumerate(construct.bodies)
    ]
