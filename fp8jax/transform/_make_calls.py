"""Equations that call the functions of `_calls`, and which function one calls."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fp8jax import _compat
from fp8jax.transform._calls import Quantize
from fp8jax.transform._interpreter import moved_to, splice


class Calls:
    """Makes the equations of one program's calls.

    Equal calls share one jaxpr, and so one function of the compiled program. Not beyond
    one program: tracing depends on the mesh and on JAX's configuration.
    """

    def __init__(self):
        self._trace = functools.cache(_traced)
        self._quantizations: dict[int, Quantize] = {}  # By `id` of the jaxpr called.

    def __call__(
        self,
        function: Callable[..., Any],
        place: Any,
        *inputs: Any,
        out_spec: jax.sharding.PartitionSpec | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """The equations of `function(*inputs)` in the place of another, and results.

        Where types are explicit, the result's sharding is the other's or `out_spec`.
        """
        out_sharding, replaced = None, place.outvars[0].aval
        if _compat.is_explicit(replaced):
            mesh, spec = replaced.sharding.mesh, replaced.sharding.spec
            spec = spec if out_spec is None else out_spec
            out_sharding = jax.sharding.NamedSharding(mesh, spec)
        context = _compat.TracingContext.of(place)
        avals = [x.aval for x in inputs]
        traced = self._trace(function, context, out_sharding, *avals)
        if isinstance(function, Quantize):
            self._quantizations[id(traced.eqns[-1].params["jaxpr"])] = function
        return splice(traced, inputs, moved_to(place))

    def quantization(self, eqn: Any) -> Quantize | None:
        """What the equation calls, if it is a `Quantize` of this program."""
        return self._quantizations.get(id(eqn.params.get("jaxpr")))


def _traced(
    function: Callable[..., Any], context: Any, out_sharding: Any, *avals: Any
) -> Any:
    if out_sharding is not None:  # Only the result's type is explicit within.
        function = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    with context.entered():
        jaxpr = _compat.open_jaxpr(jax.make_jaxpr(function)(*avals))
    assert not jaxpr.constvars, "a replacement closes over no array"
    return jaxpr
