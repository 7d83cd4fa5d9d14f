"""Makes the equation that stands in for a `dot_general`."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fp8jax import _compat, ops
from fp8jax.transform._plan import LayerDot, QuantizedDot, Replacement


def replacer() -> Callable[[Any, Replacement], Any]:
    """A function that makes the equation standing in for a `dot_general`.

    It takes the old equation and what it is to become. The new one calls a `jax.jit`
    function whose name starts with `ops.MARK`; it has the operands and the types of the
    old one, and keeps its name stack, source line and context.
    """
    # Equal products share one jaxpr, and so one function of the compiled program. Not
    # beyond one program: tracing depends on the mesh and on JAX's configuration.
    call = functools.cache(_call)

    def replace(eqn: Any, what: Replacement) -> Any:
        dimension_numbers = eqn.params["dimension_numbers"]
        options = tuple(
            (name, eqn.params[name]) for name in ("precision", "preferred_element_type")
        )
        new = call(what, dimension_numbers, options, *(v.aval for v in eqn.invars))
        (out,), (old,) = new.outvars, eqn.outvars
        same = (out.aval.shape, out.aval.dtype) == (old.aval.shape, old.aval.dtype)
        assert same, f"{out.aval} cannot stand in for {old.aval}"
        return eqn.replace(
            primitive=new.primitive, params=new.params, effects=new.effects
        )

    return replace


def _call(what: Replacement, dimension_numbers: Any, options: Any, *avals: Any) -> Any:
    """The equation of one call of a marked function."""
    if isinstance(what, QuantizedDot):
        function, name = _quantized(what, dimension_numbers, dict(options)), what.role
    else:
        function, name = _layer(what, dimension_numbers, dict(options)), "dot_general"
    function.__name__ = function.__qualname__ = f"{ops.MARK}{name}"
    jaxpr = _compat.open_jaxpr(jax.make_jaxpr(jax.jit(function))(*avals))
    assert not jaxpr.constvars, "a replacement closes over no array"
    (eqn,) = jaxpr.eqns
    return eqn


def _quantized(
    what: QuantizedDot, dimension_numbers: Any, options: dict[str, Any]
) -> Callable[..., jax.Array]:
    def function(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return ops.quantized_dot(
            lhs,
            rhs,
            dimension_numbers,
            what.lhs_spec,
            what.rhs_spec,
            preferred_element_type=options["preferred_element_type"],
            implementation=what.implementation,
        )

    return function


def _layer(
    what: LayerDot, dimension_numbers: Any, options: dict[str, Any]
) -> Callable[..., jax.Array]:
    (lhs_dims, rhs_dims), _ = dimension_numbers
    dot = functools.partial(
        ops.dot_general,
        recipe=what.recipe,
        implementation=what.implementation,
        **options,
    )

    def function(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if what.weight == "rhs":
            return dot(lhs, rhs, ((lhs_dims, rhs_dims), ((), ())))
        # `ops.dot_general` takes the weight second, and gives its dimensions last.
        out = dot(rhs, lhs, ((rhs_dims, lhs_dims), ((), ())))
        n_first = rhs.ndim - len(rhs_dims)
        order = (*range(n_first, out.ndim), *range(n_first))
        return jax.lax.transpose(out, order)

    return function
