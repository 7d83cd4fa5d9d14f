"""Finds views: equations that give their one operand's numbers in another form."""

from collections.abc import Hashable, Iterable
from typing import TypeAlias

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax.transform.ir._equations import signature
from fp8jax.transform.ir._types import Atom

# Cheap, and equal for equal parameters: a pass may make one again in another place
# instead of moving its result there. A broadcast repeats numbers, and is none.
VIEWS = ("convert_element_type", "reshape", "slice", "squeeze", "transpose")

Views: TypeAlias = dict[Var, JaxprEqn]  # Of a variable, the equation that makes it.


def is_view(eqn: JaxprEqn) -> bool:
    """Whether the equation is one, of a single variable."""
    return (
        eqn.primitive.name in VIEWS
        and len(eqn.invars) == 1
        and isinstance(eqn.invars[0], core.Var)
    )


def views_in(eqns: Iterable[JaxprEqn]) -> Views:
    """The views among a jaxpr's equations, by the variable that each makes."""
    return {eqn.outvars[0]: eqn for eqn in eqns if is_view(eqn)}


def name_of(x: Atom, views: Views) -> Hashable:
    """Names a variable by its views: equal views of one variable get one name.

    Equal ones of one value are known to be equal: each layer may cast its input itself.
    """
    if isinstance(x, core.Literal):
        return id(x)
    view = views.get(x)
    if view is None:
        return x
    return *signature(view), name_of(view.invars[0], views)


def chain_of(x: Atom, views: Views) -> tuple[Atom, list[JaxprEqn]]:
    """Follows views back to a variable; returns it and the views in order."""
    chain: list[JaxprEqn] = []
    while x in views:
        chain.insert(0, views[x])
        x = views[x].invars[0]
    return x, chain
