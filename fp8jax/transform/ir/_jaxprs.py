"""What equations of any primitive may have among their parameters."""

from collections.abc import Iterable
from typing import Any

from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir._types import AnyJaxpr


def jaxprs_of(eqn: JaxprEqn) -> list[AnyJaxpr]:
    """The jaxprs among an equation's parameters, in the order that positions count."""
    found = []
    # By name: the order of a dict depends on who made the equation, and a position must
    # mean the same body whoever did.
    for _, value in sorted(eqn.params.items()):
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [v for v in values if _compat.is_jaxpr(v)]
    return found


def called(eqn: JaxprEqn) -> AnyJaxpr | None:
    """The jaxpr that a jit, or a construct like it, runs, else None."""
    return eqn.params.get("jaxpr")


def with_jaxprs(eqn: JaxprEqn, jaxprs: Iterable[Any]) -> JaxprEqn:
    """Replaces an equation's jaxprs, in the order of `jaxprs_of`."""
    left = iter(jaxprs)
    params = dict(eqn.params)
    for name, value in sorted(eqn.params.items()):
        if _compat.is_jaxpr(value):
            params[name] = next(left)
        # Not `isinstance`: a named tuple takes its parts one by one.
        elif type(value) in (tuple, list) and any(map(_compat.is_jaxpr, value)):
            params[name] = type(value)(
                next(left) if _compat.is_jaxpr(v) else v for v in value
            )
    return eqn.replace(params=params)


def shardings_of(eqn: JaxprEqn) -> list[Any]:
    """The shardings that a constraint names, or a jit for its arguments."""
    one, several = eqn.params.get("sharding"), eqn.params.get("in_shardings", ())
    return [s for s in (one, *several) if s is not None]
