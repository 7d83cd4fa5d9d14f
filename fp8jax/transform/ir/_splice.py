"""Copies equations to another place, with variables of their own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._types import Atom

Place = Callable[[Any], dict[str, Any]]  # Of an equation, what is another there.


def moved_to(place: JaxprEqn) -> Place:
    """Places equations where another one stands: its name stack, line and context."""
    placed = {"source_info": place.source_info, "ctx": place.ctx}
    return lambda _: placed


def named_after(call: JaxprEqn) -> Place:
    """Puts a call's name stack before the equations' own."""
    outer = call.source_info.name_stack

    def place(eqn: JaxprEqn) -> dict[str, Any]:
        # Passes of a step are told by names: a body's are relative to the call's.
        names = outer + eqn.source_info.name_stack
        return {"source_info": eqn.source_info.replace(name_stack=names)}

    return place


def copied(
    eqns: Iterable[JaxprEqn], env: dict[Var, Atom], place: Place
) -> tuple[list[Any], dict[Any, Any]]:
    """Copies equations; returns the copies and what stands for each variable.

    Args:
        eqns: the others.
        env: what stands for the variables that they read and do not make.
        place: what of an equation is another there.
    """
    env, made = dict(env), []  # A copy: a caller may copy the same equations twice.
    for eqn in eqns:
        # A variable is made in one place: equal ones in two would be one value.
        outvars = [core.Var(v.aval) for v in eqn.outvars]
        invars = [read(x, env) for x in eqn.invars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        made.append(eqn.replace(invars=invars, outvars=outvars, **place(eqn)))
    return made, env


def splice(
    traced: Jaxpr, inputs: Sequence[Any], place: Place
) -> tuple[list[JaxprEqn], list[Any]]:
    """Copies a jaxpr's equations; returns the copies and its results there.

    Args:
        traced: a jaxpr without constants.
        inputs: variables or literals for its `invars`.
        place: what of an equation is another there.
    """
    env = dict(zip(traced.invars, inputs, strict=True))
    eqns, env = copied(traced.eqns, env, place)
    return eqns, [read(x, env) for x in traced.outvars]


def written_out(call: Construct) -> tuple[list[JaxprEqn], list[Any]]:
    """Writes out a plain call: its equations and results, where it stands."""
    body, eqn = _compat.open_jaxpr(call.bodies[0]), call.eqn
    return splice(body, eqn.invars, named_after(eqn))


def read(x: Atom, env: dict[Var, Atom]) -> Any:
    """Looks up what stands for a variable; other atoms stand for themselves."""
    return x if isinstance(x, core.Literal) else env.get(x, x)


def reading(eqn: JaxprEqn, env: dict[Var, Atom]) -> JaxprEqn:
    """Renames what an equation reads."""
    if not env:
        return eqn
    invars = [read(x, env) for x in eqn.invars]
    changed = any(a is not b for a, b in zip(invars, eqn.invars, strict=True))
    return eqn.replace(invars=invars) if changed else eqn


def casts_of_types(eqns: Iterable[JaxprEqn]) -> dict[Any, Any]:
    """Maps each variable that is cast to a type of explicit sharding to the cast."""
    return {
        eqn.invars[0]: eqn.outvars[0]
        for eqn in eqns
        if eqn.primitive.name in ("mesh_cast", "reshard")
        and isinstance(eqn.invars[0], core.Var)
    }
