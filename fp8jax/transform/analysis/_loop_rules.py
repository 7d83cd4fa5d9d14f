"""How values flow through loops."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

from fp8jax.transform.analysis._flow import Flow
from fp8jax.transform.analysis._lineage import in_all_iterations
from fp8jax.transform.analysis._phases import OUTSIDE, Pass, Passes
from fp8jax.transform.analysis._values import Scope, Value
from fp8jax.transform.ir import AnyJaxpr, Construct, Input, equations, jaxprs_of


def loop_rule(
    flow: Flow, loop: Construct, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """The results of a loop, whether or not it says how often it runs."""
    values = dict(zip(loop.inputs, operands, strict=True))
    carried = [x for x in loop.inputs if x.kind == "carry"]
    returned = [x for x in loop.results if x.kind == "carry"]
    stacked = [x for x in loop.inputs if x.kind == "slice"]
    # Iterations are not told apart: a loop's own operands number its carries, so that
    # a recomputed loop has the numbers of the original.
    own = stacked if loop.length is not None else _constants(loop)
    key = ("carry", loop.length, frozenset(values[x].number for x in own))
    values |= {x: _unstacked(flow, values[x]) for x in stacked}
    read = (True,) * len(carried) + scope.read[len(carried) :]

    def body(carry: list[Value]) -> list[Value]:
        given = values | dict(zip(carried, carry, strict=True))
        results: list[Value] = []
        for i, jaxpr in reversed([*enumerate(loop.bodies)]):  # The condition first.
            inputs = [given[x] for x in loop.inputs if x.inner[i] is not None]
            if not loop.returns(i):
                flow.walk(jaxpr, inputs, scope.inside(i, in_condition=True))
                continue
            times = 1 if loop.length is None else loop.length
            inside = scope.inside(i, times=times)
            results = flow.walk(jaxpr, inputs, inside, read)
        return results

    fixed = [x.inner[0] is y.inner[0] for x, y in zip(carried, returned, strict=True)]
    trains = scope.phase == "outside" and _holds_backward_pass(loop.bodies[0])
    init = [values[x] for x in carried]
    carry, results = _fixpoint(flow, body, init, fixed, key, trains)
    return [
        *_after_loop(flow, carry, fixed),
        *(_stacked(flow, y) for y in results[len(carried) :]),
    ]


def _constants(loop: Construct) -> list[Input]:
    return [x for x in loop.inputs if x.kind == "constant" and x.inner[0] is not None]


def _holds_backward_pass(jaxpr: AnyJaxpr) -> bool:
    """Whether a loop that is not differentiated itself has train steps for a body."""
    passes = Passes()

    def holds(jaxpr: AnyJaxpr, outer: Pass) -> bool:
        for eqn in equations(jaxpr):
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
        grown = [in_all_iterations(c, r) for c, r in zip(carry, results, strict=False)]
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
