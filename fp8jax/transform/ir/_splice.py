"""Copies of equations with variables of their own, in another place."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._types import Atom

Place = Callable[[Any], dict[str, Any]]  # Of an equation, what is another there.


def moved_to(place: JaxprEqn) -> Place:
    """Equations get another one's name stack, source line and context."""
    placed = {"source_info": place.source_info, "ctx": place.ctx}
    return lambda _: placed


def named_after(call: JaxprEqn) -> Place:
    """Equations stay where they are, under the name stack of the call before theirs."""
    outer = call.source_info.name_stack

    def place(eqn: JaxprEqn) -> dict[str, Any]:
        names = outer + eqn.source_info.name_stack
        return {"source_info": eqn.source_info.replace(name_stack=names)}

    return place


def copied(
    eqns: Iterable[JaxprEqn], env: dict[Var, Atom], place: Place
) -> tuple[list[Any], dict[Any, Any]]:
    """Equations that compute others elsewhere, and what stands for each variable.

    Args:
        eqns: the others.
        env: what stands for the variables that they read and do not make.
        place: what of an equation is another there.
    """
    env, made = dict(env), []
    for eqn in eqns:
        outvars = [core.Var(v.aval) for v in eqn.outvars]
        invars = [read(x, env) for x in eqn.invars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        made.append(eqn.replace(invars=invars, outvars=outvars, **place(eqn)))
    return made, env


def splice(
    traced: Jaxpr, inputs: Sequence[Any], place: Place
) -> tuple[list[JaxprEqn], list[Any]]:
    """Equations that compute a jaxpr elsewhere, and the variables of its results.

    Args:
        traced: a jaxpr without constants.
        inputs: variables or literals for its `invars`.
        place: what of an equation is another there.
    """
    env = dict(zip(traced.invars, inputs, strict=True))
    eqns, env = copied(traced.eqns, env, place)
    return eqns, [read(x, env) for x in traced.outvars]


def written_out(call: Construct) -> tuple[list[JaxprEqn], list[Any]]:
    """A plain call's equations where it stands, and the variables of its results."""
    body, eqn = _compat.open_jaxpr(call.bodies[0]), call.eqn
    return splice(body, eqn.invars, named_after(eqn))


def read(x: Atom, env: dict[Var, Atom]) -> Any:
    """What stands for a variable, itself if nothing does; a literal as it is."""
    return x if isinstance(x, core.Literal) else env.get(x, x)


def reading(eqn: JaxprEqn, env: dict[Var, Atom]) -> JaxprEqn:
    """The equation with other variables for some that it reads."""
    if not env:
        return eqn
    invars = [read(x, env) for x in eqn.invars]
    changed = any(a is not b for a, b in zip(invars, eqn.invars, strict=True))
    return eqn.replace(invars=invars) if changed else eqn


def casts_of_types(eqns: Iterable[JaxprEqn]) -> dict[Any, Any]:
    """Of a variable, its cast to a type with an explicit sharding, if there is one."""
    return {
        eqn.invars[0]: eqn.outvars[0]
        for eqn in eqns
        if eqn.primitive.name in ("mesh_cast", "reshard")
        and isinstance(eqn.invars[0], core.Var)
    }
