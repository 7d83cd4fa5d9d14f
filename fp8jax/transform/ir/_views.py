"""Views: equations that give the numbers of their one operand in another form."""

from collections.abc import Hashable, Iterable
from typing import TypeAlias

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax.transform.ir._equations import signature
from fp8jax.transform.ir._types import Atom

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
    """Those among a jaxpr's equations."""
    return {eqn.outvars[0]: eqn for eqn in eqns if is_view(eqn)}


def name_of(x: Atom, views: Views) -> Hashable:
    """The same for equal views of the same variable.

    Equal ones of one value are known to be equal: each layer may cast its input itself.
    """
    if isinstance(x, core.Literal):
        return id(x)
    view = views.get(x)
    if view is None:
        return x
    return *signature(view), name_of(view.invars[0], views)


def chain_of(x: Atom, views: Views) -> tuple[Atom, list[JaxprEqn]]:
    """The variable that `x` is a view of, and the views in between, in order."""
    chain: list[JaxprEqn] = []
    while x in views:
        chain.insert(0, views[x])
        x = views[x].invars[0]
    return x, chain
