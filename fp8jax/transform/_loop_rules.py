"""How values flow through loops."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from fp8jax import _compat
from fp8jax.transform._interpreter import Flow
from fp8jax.transform._phases import OUTSIDE, Pass, Passes
from fp8jax.transform._values import Scope, Value, joined
from fp8jax.transform.ir import jaxprs_of


def scan_rule(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    n_consts, n_carry = _compat.scan_counts(eqn.params)
    length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
    consts = list(operands[:n_consts])
    init = list(operands[n_consts : n_consts + n_carry])
    stacked = operands[n_consts + n_carry :]
    # Iterations are not told apart: a loop's own operands number its carries, so that
    # a recomputed loop has the numbers of the original.
    loop = (length, frozenset(x.number for x in stacked))
    steps = [_unstacked(flow, x) for x in stacked]

    read = (True,) * n_carry + scope.read[n_carry:]

    def body(carry: list[Value]) -> list[Value]:
        inside = scope.inside(times=length)
        return flow.walk(jaxpr, [*consts, *carry, *steps], inside, read)

    fixed = _fixed_carries(jaxpr, n_consts, n_carry)
    trains = scope.phase == "outside" and _holds_backward_pass(jaxpr)
    carry, results = _fixpoint(flow, body, init, fixed, ("carry", *loop), trains)
    return [
        *_after_loop(flow, carry, fixed),
        *(_stacked(flow, y) for y in results[n_carry:]),
    ]


def while_rule(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts = list(operands[:n_cond])
    consts = list(operands[n_cond : n_cond + n_body])
    init = list(operands[n_cond + n_body :])
    jaxprs = jaxprs_of(eqn)  # The body comes first in the alphabet.
    body_jaxpr, cond_jaxpr = jaxprs

    def body(carry: list[Value]) -> list[Value]:
        inside = scope.inside(1, in_condition=True)
        flow.walk(cond_jaxpr, [*cond_consts, *carry], inside)
        return flow.walk(body_jaxpr, [*consts, *carry], scope.inside(0))

    fixed = _fixed_carries(body_jaxpr, n_body, len(init))
    loop = ("while", frozenset(x.number for x in consts))
    trains = scope.phase == "outside" and _holds_backward_pass(body_jaxpr)
    carry, _ = _fixpoint(flow, body, init, fixed, loop, trains)
    return _after_loop(flow, carry, fixed)


def _fixed_carries(jaxpr: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which carries a loop's body returns as they came."""
    inner = _compat.open_jaxpr(jaxpr)
    carried = inner.invars[n_consts : n_consts + n_carry]
    returned = inner.outvars[:n_carry]
    return [a is b for a, b in zip(carried, returned, strict=True)]


def _holds_backward_pass(jaxpr: Any) -> bool:
    """Whether a loop that is not differentiated itself has train steps for a body."""
    passes = Passes()

    def holds(jaxpr: Any, outer: Pass) -> bool:
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            here = passes.at(outer, eqn)
            if here.phase == "backward":
                return True
            if any(holds(sub, here) for sub in jaxprs_of(eqn)):
                return True
        return False

    return holds(jaxpr, OUTSIDE)


def _fixpoint(
    flow: Flow,
    body: Callable[[list[Value]], list[Value]],
    init: list[Value],
    fixed: list[bool],
    loop: tuple[Hashable, ...],
    trains: bool,
) -> tuple[list[Value], list[Value]]:
    """Carries that no further iteration changes, and that iteration's results.

    Where iterations are train steps, each begins with what are arguments to it: updated
    parameters are parameters, though all that was trained on went into them.
    """
    carry = []
    for i, (x, is_fixed) in enumerate(zip(init, fixed, strict=True)):
        number = x.number if is_fixed else flow.number(*loop, i, x.number)
        root = x.root if is_fixed else number
        carry.append(dataclasses.replace(x, number=number, root=root))
    while True:  # Ends: knowledge only grows, and there is finitely much of it.
        results = body(carry)
        grown = [
            dataclasses.replace(joined([c, r]), number=c.number, root=c.root)
            for c, r in zip(carry, results, strict=False)
        ]
        if trains or grown == carry:
            return grown, results
        carry = grown


def _after_loop(flow: Flow, carry: list[Value], fixed: list[bool]) -> list[Value]:
    values = []
    for x, is_fixed in zip(carry, fixed, strict=True):
        number = x.number if is_fixed else flow.number("last", x.number)
        root = x.root if is_fixed else number
        values.append(dataclasses.replace(x, number=number, root=root))
    return values


def _stacked(flow: Flow, x: Value) -> Value:
    return _renumbered(x, functools.partial(_inverse, flow, "stack", "slice"))


def _unstacked(flow: Flow, x: Value) -> Value:
    return _renumbered(x, functools.partial(_inverse, flow, "slice", "stack"))


def _inverse(flow: Flow, name: str, inverse: str, number: int) -> int:
    key = flow.key(number)
    return key[1] if key[0] == inverse else flow.number(name, number)


def _renumbered(x: Value, f: Callable[[int], int]) -> Value:
    return dataclasses.replace(x, number=f(x.number), root=f(x.root))
