"""One walk over nested jaxprs: memoized, so that what is shared stays shared."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from fp8jax import _compat, ops
from fp8jax.transform.ir._constructs import Construct


def memoized(visit: Callable[..., Any]) -> Callable[..., Any]:
    """`visit(jaxpr, *context)`, run once for each jaxpr object and context.

    One jaxpr may be called from many places: where the context agrees, so must what is
    made of it, or XLA compiles every layer by itself.
    """
    done: dict[Hashable, tuple[Any, Any]] = {}

    @functools.wraps(visit)
    def run(jaxpr: Any, *context: Hashable) -> Any:
        key = id(jaxpr), context
        if key not in done:
            done[key] = jaxpr, visit(jaxpr, *context)  # Kept: its number stays its own.
        return done[key][1]

    return run


def construct_of(eqn: Any) -> Construct | None:
    """The construct whose bodies a pass may change; None of our own calls, and others.

    Bodies that a gradient rule stands beside are not entered: the rule would not agree.
    """
    if ops.mark_of(eqn) is not None:
        return None
    construct = Construct.of(eqn)
    return None if construct is None or construct.is_fixed else construct


def with_bodies(eqn: Any, visit: Callable[..., Any], *contexts: Sequence[Any]) -> Any:
    """The equation with its bodies visited; itself if that changes none.

    Args:
        eqn: an equation.
        visit: of a body and its contexts.
        contexts: for each argument of `visit` after the first, one for each body.
    """
    construct = construct_of(eqn)
    return eqn if construct is None else construct.visited(visit, *contexts).equation()


def with_equations(
    jaxpr: Any, eqns: Sequence[Any], outvars: Sequence[Any] | None = None
) -> Any:
    """The jaxpr of other equations and results; itself if they are the same objects."""
    inner = _compat.open_jaxpr(jaxpr)
    results = list(inner.outvars if outvars is None else outvars)
    old, new = (*inner.eqns, *inner.outvars), (*eqns, *results)
    if [*map(id, old)] == [*map(id, new)]:
        return jaxpr
    return _compat.with_parts(jaxpr, eqns=list(eqns), outvars=results)


def equations(jaxpr: Any) -> list[Any]:
    """Of a jaxpr with constants or without."""
    return list(_compat.open_jaxpr(jaxpr).eqns)
