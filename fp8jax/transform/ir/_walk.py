"""One walk over nested jaxprs: memoized, so that what is shared stays shared."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from jax.extend.core import JaxprEqn

from fp8jax import _compat, ops
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._table import is_construct
from fp8jax.transform.ir._types import AnyJaxpr

_Result = TypeVar("_Result")


def memoized(
    visit: Callable[..., _Result],
    key: Callable[..., Hashable] = lambda *context: context,
) -> Callable[..., _Result]:
    """`visit(jaxpr, *context)`, run once for each jaxpr object and `key(*context)`.

    One jaxpr may be called from many places: where the context agrees, so must what is
    made of it, or XLA compiles every layer by itself.
    """
    done: dict[Hashable, tuple[AnyJaxpr, _Result]] = {}

    @functools.wraps(visit)
    def run(jaxpr: AnyJaxpr, *context: Any) -> _Result:
        found = id(jaxpr), key(*context)
        if found not in done:
            done[found] = jaxpr, visit(jaxpr, *context)  # Kept: its number is its own.
        return done[found][1]

    return run


def construct_of(eqn: JaxprEqn, with_rules: bool = False) -> Construct | None:
    """Takes an equation apart if a pass may change its bodies; our calls' stay.

    Args:
        eqn: an equation.
        with_rules: whether to give those, too, whose bodies must stay because a rule
            stands beside them, which would not agree with others.
    """
    if not is_construct(eqn) or ops.mark_of(eqn) is not None:
        return None
    construct = Construct.of(eqn)
    if construct is None or (construct.is_fixed and not with_rules):
        return None
    return construct


def with_bodies(
    eqn: JaxprEqn, visit: Callable[..., Any], *contexts: Sequence[Any]
) -> JaxprEqn:
    """Visits an equation's bodies; returns the equation itself if none changes.

    Args:
        eqn: an equation.
        visit: of a body and its contexts.
        contexts: for each argument of `visit` after the first, one for each body.
    """
    construct = construct_of(eqn)
    return eqn if construct is None else construct.visited(visit, *contexts).equation()


def with_equations(
    jaxpr: AnyJaxpr, eqns: Sequence[JaxprEqn], outvars: Sequence[Any] | None = None
) -> Any:
    """Replaces a jaxpr's equations and results; returns itself if they are its own."""
    # Unchanged it stays the object that it is: what several equations run stays shared.
    inner = _compat.open_jaxpr(jaxpr)
    results = list(inner.outvars if outvars is None else outvars)
    old, new = (*inner.eqns, *inner.outvars), (*eqns, *results)
    if [*map(id, old)] == [*map(id, new)]:
        return jaxpr
    return _compat.with_parts(jaxpr, eqns=list(eqns), outvars=results)


def equations(jaxpr: AnyJaxpr) -> list[JaxprEqn]:
    """The equations of a jaxpr with constants or without."""
    return list(_compat.open_jaxpr(jaxpr).eqns)
