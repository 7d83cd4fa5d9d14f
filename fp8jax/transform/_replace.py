"""Makes the equation that stands in for a `dot_general`."""

from collections.abc import Callable
from typing import Any

import jax

from fp8jax import _compat, ops
from fp8jax.transform._plan import LayerDot, QuantizedDot, Replacement


def replace_dot(eqn: Any, replacement: Replacement) -> Any:
    """`eqn`, computed as `replacement` says: same operands, same types.

    The new equation calls a `jax.jit` function whose name starts with `ops.MARK`, and
    keeps the name stack, the source line and the context of the old one.
    """
    if isinstance(replacement, QuantizedDot):
        function, name = _quantized(eqn.params, replacement), replacement.role
    else:
        function, name = _layer(eqn, replacement), "dot_general"
    function.__name__ = function.__qualname__ = f"{ops.MARK}{name}"
    call = jax.make_jaxpr(jax.jit(function))(*(v.aval for v in eqn.invars))
    inner = _compat.open_jaxpr(call)
    (new,) = inner.eqns
    assert not inner.constvars, "a replacement closes over no array"
    (out,), (old_out,) = new.outvars, eqn.outvars
    if (out.aval.shape, out.aval.dtype) != (old_out.aval.shape, old_out.aval.dtype):
        raise AssertionError(f"{name} made {out.aval} of {old_out.aval}")
    return eqn.replace(primitive=new.primitive, params=new.params, effects=new.effects)


def _quantized(params: dict[str, Any], what: QuantizedDot) -> Callable[..., jax.Array]:
    def function(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return ops.quantized_dot(
            lhs,
            rhs,
            params["dimension_numbers"],
            what.lhs_spec,
            what.rhs_spec,
            preferred_element_type=params["preferred_element_type"],
            implementation=what.implementation,
        )

    return function


def _layer(eqn: Any, what: LayerDot) -> Callable[..., jax.Array]:
    (lhs_dims, rhs_dims), _ = eqn.params["dimension_numbers"]
    options = {
        "precision": eqn.params["precision"],
        "preferred_element_type": eqn.params["preferred_element_type"],
        "recipe": what.recipe,
        "implementation": what.implementation,
    }

    def function(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if what.weight == "rhs":
            return ops.dot_general(
                lhs, rhs, ((lhs_dims, rhs_dims), ((), ())), **options
            )
        # `ops.dot_general` takes the weight second, and gives its dimensions last.
        out = ops.dot_general(rhs, lhs, ((rhs_dims, lhs_dims), ((), ())), **options)
        n_first = rhs.ndim - len(rhs_dims)
        order = (*range(n_first, out.ndim), *range(n_first))
        return jax.lax.transpose(out, order)

    return function
