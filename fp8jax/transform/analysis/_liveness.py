"""Which results of a jaxpr's equations are read: the others XLA never computes."""

from collections.abc import Sequence

from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir import AnyJaxpr

Read = tuple[bool, ...]  # For each result of an equation, or of a jaxpr.


def reads(jaxpr: AnyJaxpr, results: Read | None = None) -> list[Read]:
    """For each equation, which of its results anything reads that is read itself.

    Args:
        jaxpr: with or without constants.
        results: which results of the jaxpr are read; all by default.
    """
    inner = _compat.open_jaxpr(jaxpr)
    wanted = results or (True,) * len(inner.outvars)
    pairs = zip(inner.outvars, wanted, strict=True)
    read = {v for v, is_read in pairs if is_read and isinstance(v, core.Var)}
    found: list[Read] = []
    for eqn in reversed(inner.eqns):
        found.append(tuple(v in read for v in eqn.outvars))
        if any(found[-1]) or eqn.effects:
            read.update(x for x in eqn.invars if isinstance(x, core.Var))
    return found[::-1]


def is_dead(eqn: JaxprEqn, read: Sequence[bool]) -> bool:
    """Whether leaving the equation out would change nothing."""
    return not any(read) and not eqn.effects
