"""The jaxprs among an equation's parameters, whatever the primitive."""

from collections.abc import Iterable
from typing import Any

from fp8jax import _compat


def jaxprs_of(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, in the order that positions count."""
    found = []
    for _, value in sorted(eqn.params.items()):
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [v for v in values if _compat.is_jaxpr(v)]
    return found


def with_jaxprs(eqn: Any, jaxprs: Iterable[Any]) -> Any:
    """An equation with other jaxprs in the places of its own."""
    left = iter(jaxprs)
    params = dict(eqn.params)
    for name, value in sorted(eqn.params.items()):
        if _compat.is_jaxpr(value):
            params[name] = next(left)
        elif type(value) in (tuple, list) and any(map(_compat.is_jaxpr, value)):
            params[name] = type(value)(
                next(left) if _compat.is_jaxpr(v) else v for v in value
            )
    return eqn.replace(params=params)
