"""Stacked weights in scans: which results are slices of them, stacked again."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.extend import core

from fp8jax import _compat
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._views import chain_of, views_in
from fp8jax.transform.ir import jaxprs_of, with_jaxprs


class Stacks:
    """Results of one jaxpr's scans that are views of another array's slices.

    A scan that casts its slice of a weight keeps the cast ones, stacked, for the
    backward scan: the cast of all of the weight.
    """

    def __init__(self):
        # Of a result, the array, and the views of each of its slices, in order.
        self._found: dict[Any, tuple[Any, list[Any]]] = {}

    def found_in(self, scan: Any, weights: Collection[Any]) -> list[Any]:
        """Those among an equation's results, of weights; none if it is no scan."""
        if scan.primitive.name != "scan":
            return []
        body = _compat.open_jaxpr(scan.params["jaxpr"])
        n_consts, n_carry = _compat.scan_counts(scan.params)
        start = n_consts + n_carry
        slices = dict(zip(body.invars[start:], scan.invars[start:], strict=True))
        views = views_in(body.eqns)
        found = []
        pairs = zip(body.outvars[n_carry:], scan.outvars[n_carry:], strict=True)
        for inner, result in pairs:
            if not isinstance(inner, core.Var):
                continue
            root, chain = chain_of(inner, views)
            stack = slices.get(root)
            if isinstance(stack, core.Var) and stack in weights:
                before = self._found.get(stack, (stack, []))
                self._found[result] = before[0], [*before[1], *chain]
                found.append(result)
        return found

    def views_of(
        self, stack: Any, chain: Sequence[Any], scan: Any
    ) -> tuple[list[Any], Any]:
        """Views of each slice of an array, as equations in the place of a scan.

        Returns:
            The equations, and the variable that has the result.
        """
        stack, before = self._found.get(stack, (stack, []))
        eqns = []
        for view in (*before, *chain):
            with _compat.TracingContext.of(view).entered():
                run = jax.vmap(functools.partial(_compat.bind, view))
                traced = _compat.open_jaxpr(jax.make_jaxpr(run)(stack.aval))
            made, (stack,) = splice(traced, [stack], moved_to(scan))
            eqns += made
        return eqns, stack


def without_inputs(eqn: Any, unread: Collection[Any]) -> Any:
    """An equation without some inputs of its one jaxpr, and their operands."""
    (jaxpr,) = jaxprs_of(eqn)
    invars = _compat.open_jaxpr(jaxpr).invars
    stays = [i for i, v in enumerate(invars) if v not in unread]
    if len(stays) == len(invars):
        return eqn
    jaxpr = _compat.with_parts(jaxpr, invars=[invars[i] for i in stays])
    eqn = eqn.replace(invars=[eqn.invars[i] for i in stays])
    return with_jaxprs(eqn, [jaxpr])
