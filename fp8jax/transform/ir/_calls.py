"""Makes a program's own calls, and recognizes them later."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import AbstractValue
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding

from fp8jax import _compat, ops
from fp8jax.transform.ir._jaxprs import called
from fp8jax.transform.ir._splice import moved_to, splice
from fp8jax.transform.ir._types import Atom, aval_of


class Calls:
    """Makes the equations of one program's calls.

    Equal calls share one jaxpr, and so one function of the compiled program. Not beyond
    one program: tracing depends on the mesh and on JAX's configuration.
    """

    def __init__(self):
        # This object's own, so that it goes when the program does.
        self._trace = functools.cache(_traced)
        # By `id` of the jaxpr called, which is kept so that no other has its number.
        self._called: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        place: JaxprEqn,
        *inputs: Atom,
        out_spec: jax.sharding.PartitionSpec | None = None,
    ) -> tuple[list[JaxprEqn], list[Any]]:
        """Traces `function(*inputs)` where `place` stands: equations and results.

        Where types are explicit, the result's sharding is the other's or `out_spec`.
        """
        out_sharding, replaced = None, aval_of(place.outvars[0])
        if _compat.is_explicit(replaced):
            mesh, spec = replaced.sharding.mesh, replaced.sharding.spec
            spec = spec if out_spec is None else out_spec
            out_sharding = jax.sharding.NamedSharding(mesh, spec)
        context = _compat.TracingContext.of(place)
        avals = [aval_of(x) for x in inputs]
        traced = self._trace(function, context, out_sharding, *avals)
        for eqn in traced.eqns:
            self.add(eqn, function)
        return splice(traced, inputs, moved_to(place))

    def add(self, eqn: JaxprEqn, function: Callable[..., Any]) -> None:
        """Registers what an equation calls, if it is a call of our own."""
        if ops.mark_of(eqn) is not None:
            jaxpr = called(eqn)
            self._called[id(jaxpr)] = jaxpr, function

    def of(self, eqn: JaxprEqn) -> Callable[..., Any] | None:
        """Returns what the equation calls, if this program was given the call.

        Told by the jaxpr that is called, not by its name: that one is ours is in the
        name, which it is on survives no change of it.
        """
        known = self._called.get(id(called(eqn)))
        return None if known is None else known[1]


def _traced(
    function: Callable[..., Any],
    context: _compat.TracingContext,
    out_sharding: NamedSharding | None,
    *avals: AbstractValue,
) -> Any:
    if out_sharding is not None:  # Only the result's type is explicit within.
        function = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    with context.entered():
        jaxpr = _compat.open_jaxpr(jax.make_jaxpr(function)(*avals))
    assert not jaxpr.constvars, "a replacement closes over no array"
    return jaxpr
