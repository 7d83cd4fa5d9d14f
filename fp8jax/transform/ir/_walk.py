"""One walk over nested jaxprs: memoized, so that what is shared stays shared."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from fp8jax import _compat, ops
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._table import is_construct


def memoized(visit: Callable[..., Any], key: Any = lambda *context: context) -> Any:
    """`visit(jaxpr, *context)`, run once for each jaxpr object and `key(*context)`.

    One jaxpr may be called from many places: where the context agrees, so must what is
    made of it, or XLA compiles every layer by itself.
    """
    done: dict[Hashable, tuple[Any, Any]] = {}

    @functools.wraps(visit)
    def run(jaxpr: Any, *context: Any) -> Any:
        found = id(jaxpr), key(*context)
        if found not in done:
            done[found] = jaxpr, visit(jaxpr, *context)  # Kept: its number is its own.
        return done[found][1]

    return run


def construct_of(eqn: Any, with_rules: bool = False) -> Construct | None:
    """The construct whose bodies a pass may change; None of our own calls, and others.

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
