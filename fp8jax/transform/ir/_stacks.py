"""Finds results of scans that are slices of stacked weights, stacked again."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir._constructs import Construct
from fp8jax.transform.ir._splice import moved_to, splice
from fp8jax.transform.ir._views import chain_of, views_in
from fp8jax.transform.ir._walk import equations


class Stacks:
    """Results of one jaxpr's scans that are views of another array's slices.

    A scan that casts its slice of a weight keeps the cast ones, stacked, for the
    backward scan: the cast of all of the weight.
    """

    def __init__(self):
        # Of a result, the array, and the views of each of its slices, in order.
        self._found: dict[Any, tuple[Any, list[Any]]] = {}

    def found_in(self, scan: Construct, weights: Collection[Any]) -> list[Any]:
        """Registers results of an equation that are views of weights; returns them."""
        slices = scan.sliced
        views = views_in(equations(scan.bodies[0])) if slices else {}
        found = []
        for x in scan.results:
            if x.kind != "stack" or not isinstance(x.inner[0], core.Var):
                continue
            root, chain = chain_of(x.inner[0], views)
            stack = slices.get(root) if isinstance(root, core.Var) else None
            if isinstance(stack, core.Var) and stack in weights:
                # A stack of a stack: its views come after those of the first.
                before = self._found.get(stack, (stack, []))
                self._found[x.outvar] = before[0], [*before[1], *chain]
                found.append(x.outvar)
        return found

    def views_of(
        self, stack: Var, chain: Sequence[JaxprEqn], scan: JaxprEqn
    ) -> tuple[list[Any], Any]:
        """Makes views of each slice of an array, as equations before a scan.

        Returns:
            The equations, and the variable that has the result.
        """
        stack, before = self._found.get(stack, (stack, []))
        eqns = []
        for view in (*before, *chain):
            # By vmap of the view itself: whatever its parameters are, batching knows.
            with _compat.TracingContext.of(view).entered():
                run = jax.vmap(functools.partial(_compat.bind, view))
                traced = _compat.open_jaxpr(jax.make_jaxpr(run)(stack.aval))
            made, (stack,) = splice(traced, [stack], moved_to(scan))
            eqns += made
        return eqns, stack
