"""Makes the codes for wgrad in the forward scan that keeps their operand.

A scan over layers stacks each layer's input for its backward scan, which quantizes a
slice of it at a time. With `residual="fp8"` the forward scan stacks the codes instead.
"""

import dataclasses
from typing import Any

from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax.transform.ir import (
    AnyJaxpr,
    Calls,
    Construct,
    chain_of,
    construct_of,
    copied,
    equations,
    memoized,
    moved_to,
    views_in,
    with_bodies,
    with_equations,
)
from fp8jax.transform.lower import Program, Quantize


def carry(program: Program) -> Program:
    """Moves quantizations for wgrad into the forward scans that keep their operands."""

    @memoized
    def visit(jaxpr: AnyJaxpr) -> AnyJaxpr:
        eqns: list[JaxprEqn] = []
        made_by: dict[Any, int] = {}  # Results of scans: which equation's.
        for old in equations(jaxpr):
            eqn = with_bodies(old, visit)
            scan = construct_of(eqn)
            # A loop of unknown length stacks nothing: only a scan keeps residuals.
            if scan is not None and scan.length is not None:
                for early in _early_calls(scan, program.calls):
                    index = made_by.get(early.stacked)
                    # A stack that is an argument has no scan to make its codes in.
                    if index is not None:
                        eqns[index], eqn = _carried(eqns[index], eqn, early)
                # After the edit: a scan may be backward to one and forward to another.
                made_by.update(dict.fromkeys(eqn.outvars, len(eqns)))
            eqns.append(eqn)
        return with_equations(jaxpr, eqns)

    return program.of(visit(program.jaxpr))


@dataclasses.dataclass(frozen=True)
class _Early:
    """A quantization in a scan's body that depends on a slice of one stack alone.

    Attributes:
        stacked: the array, where the scan is.
        slice: of it, in the body.
        eqns: views of the slice, and the call.
    """

    stacked: core.Var
    slice: core.Var
    eqns: tuple[JaxprEqn, ...]


def _early_calls(scan: Construct, calls: Calls) -> list[_Early]:
    stacked = scan.sliced
    eqns = equations(scan.bodies[0])
    views = views_in(eqns)
    found = []
    for eqn in eqns:
        call = calls.of(eqn)
        if isinstance(call, Quantize) and call.is_early:
            x, chain = chain_of(eqn.invars[0], views)
            if not isinstance(x, core.Var):
                continue
            if isinstance(stack := stacked.get(x), core.Var):
                found.append(_Early(stack, x, (*chain, eqn)))
    return found


def _carried(
    forward_eqn: JaxprEqn, backward_eqn: JaxprEqn, early: _Early
) -> tuple[JaxprEqn, JaxprEqn]:
    """Moves the call from the backward scan's body into the forward scan's."""
    forward, backward = Construct.of(forward_eqn), Construct.of(backward_eqn)
    assert forward is not None, "its result is a scan's"
    assert backward is not None, "it reads a slice"
    call = early.eqns[-1]
    (kept,) = (x.inner[0] for x in forward.results if x.outvar is early.stacked)
    assert kept is not None, "a scan's body returns what is stacked"
    before, after = equations(forward.bodies[0]), equations(backward.bodies[0])
    # Where the value was made, or the scan's own place if it came in from outside.
    places = [eqn for eqn in before if any(kept is v for v in eqn.outvars)]
    place = moved_to((places or [forward_eqn])[-1])
    eqns, env = copied(early.eqns, {early.slice: kept}, place)
    stacks = [forward.result(env[v]) for v in call.outvars]
    slices = [
        backward.slices(stack.outvar, v)
        for stack, v in zip(stacks, call.outvars, strict=True)
    ]
    # The views before the call stay: others may read them, and `clean` knows.
    left = [eqn for eqn in after if eqn is not call]
    return (
        dataclasses.replace(
            forward.with_body(0, eqns=[*before, *eqns]),
            results=(*forward.results, *stacks),
        ).equation(),
        dataclasses.replace(
            backward.with_body(0, eqns=left), inputs=(*backward.inputs, *slices)
        ).equation(),
    )
