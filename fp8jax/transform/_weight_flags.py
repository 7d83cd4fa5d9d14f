"""Which values of a program depend on parameters alone."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from fp8jax import _compat
from fp8jax.transform.ir import jaxprs_of

Flags = tuple[bool, ...]  # For each input of a jaxpr.


def flagged(jaxpr: Any, is_weight: Sequence[bool]) -> set[Any]:
    """The inputs of a jaxpr that do."""
    invars = _compat.open_jaxpr(jaxpr).invars
    return {v for v, known in zip(invars, is_weight, strict=True) if known}


def add_results(eqn: Any, weights: set[Any]) -> None:
    """Adds an equation's results, if they do."""
    operands = [x for x in eqn.invars if isinstance(x, core.Var)]
    if operands and all(x in weights for x in operands):
        weights.update(eqn.outvars)


def inner_flags(eqn: Any, weights: set[Any]) -> list[Flags]:
    """Of the inputs of each of an equation's jaxprs; a carry has its first value's."""
    flags = tuple(not isinstance(x, core.Var) or x in weights for x in eqn.invars)
    subs = jaxprs_of(eqn)
    if eqn.primitive.name == "cond":
        return [flags[1:]] * len(subs)
    if eqn.primitive.name == "while":
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        return [flags[n_cond:], flags[:n_cond] + flags[n_cond + n_body :]]
    counts = [len(_compat.open_jaxpr(sub).invars) for sub in subs]
    return [flags if n == len(flags) else (False,) * n for n in counts]
