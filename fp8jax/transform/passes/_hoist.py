"""Takes quantizations of weights out of the loops and remat bodies around them.

A scan over microbatches closes over its weights, and a scan over layers reads a slice
of each: their codes are made once, before the loop, and a scan over layers then reads
slices of the codes, forward as backward.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax.transform.analysis import (
    Flags,
    add_results,
    flagged,
    inner_flags,
)
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    Construct,
    Input,
    Stacks,
    chain_of,
    construct_of,
    copied,
    equations,
    memoized,
    moved_to,
    views_in,
    with_equations,
)
from fp8jax.transform.lower import Moments, Program, Quantize


def hoist(program: Program) -> Program:
    """Moves quantizations out to where they run once.

    What a loop does not change leaves it. Slices of stacked arrays do only if those are
    weights: the codes of all of an activation's would be one more thing to keep.
    """
    calls = program.calls

    @memoized
    def visit(jaxpr: AnyJaxpr, flags: Flags) -> AnyJaxpr:
        weights = flagged(jaxpr, flags)
        stacks = Stacks()
        eqns: list[JaxprEqn] = []
        for eqn in equations(jaxpr):
            construct, before = construct_of(eqn), []
            if construct is not None:
                # Inner bodies first: what leaves one may leave this one, too.
                construct = construct.visited(visit, inner_flags(construct, weights))
                if construct.length:
                    more, construct = _slices_before(construct, weights, stacks, calls)
                    before += more
                more, construct = _constants_before(construct, weights, calls)
                before += more
                eqn = construct.equation()
            # What is made of weights alone counts as one: outer loops hoist it, too.
            for made in (*before, eqn):
                add_results(made, weights)
            if construct is not None:
                weights.update(stacks.found_in(construct, weights))
            eqns += [*before, eqn]
        return with_equations(jaxpr, eqns)

    return program.of(visit(program.jaxpr, program.is_weight))


def _is_in(
    x: Atom, variables: Mapping[core.Var, Any] | set[core.Var]
) -> TypeGuard[core.Var]:
    return isinstance(x, core.Var) and x in variables


def _constants_before(
    construct: Construct, weights: set[Var], calls: Calls
) -> tuple[list[JaxprEqn], Construct]:
    """Splits the first body: equations that read constants alone, and what is left.

    Of a call all operands are constants: what it makes of weights leaves it. A branch
    keeps what is its own, which may never run, and so does what is placed on devices.
    """
    if construct.chooses or not construct.takes_inputs:
        return [], construct
    # A call runs once: of an activation in it nothing would be saved, and the codes
    # would live longer, across a remat even.
    sources: dict[Any, Atom] = {
        x.inner[0]: x.operand
        for x in construct.inputs
        if x.kind == "constant" and (construct.iterates or _is_in(x.operand, weights))
    }
    body, place = equations(construct.bodies[0]), moved_to(construct.eqn)
    views = views_in(body)
    values: dict[Any, Any] = {}  # Of a variable of the body, what stands for it.
    made, moved = [], []
    for old in body:
        # Moments read codes: they follow once those have left, so that what is measured
        # of a weight is measured once.
        if not isinstance(calls.of(old), (Quantize, Moments)):
            continue
        x, *codes = old.invars
        root, chain = chain_of(x, views) if isinstance(x, core.Var) else (x, [])
        if not _is_in(root, sources) or not all(v in values for v in codes):
            continue
        env = {root: sources[root], **{v: values[v] for v in codes}}
        new, env = copied([*chain, old], env, place)
        values.update({v: env[v] for v in old.outvars})
        made += new
        moved.append(old)
    inputs = [construct.constant(x, v) for v, x in values.items()]
    return made, _given(construct, inputs, moved)


def _slices_before(
    scan: Construct, weights: set[Var], stacks: Stacks, calls: Calls
) -> tuple[list[JaxprEqn], Construct]:
    """As `_constants_before`, of slices of stacked weights."""
    stacked = scan.sliced.items()
    sources = {v: x for v, x in stacked if _is_in(x, weights)}
    body, place = equations(scan.bodies[0]), moved_to(scan.eqn)
    views = views_in(body)
    values: dict[Any, Any] = {}
    made, moved = [], []
    for old in body:
        quantize = calls.of(old)
        if not isinstance(quantize, Quantize):
            continue
        root, chain = chain_of(old.invars[0], views)
        if not _is_in(root, sources):
            continue
        # Of the stack of what a scan casts there may be a copy already, in bfloat16:
        # a backward scan quantizes slices of that one.
        new, stack = stacks.views_of(sources[root], chain, scan.eqn)
        assert scan.length is not None, "a scan says how long it is"
        codes, results = calls(quantize.stacked(scan.length), old, stack)
        values.update(zip(old.outvars, results, strict=True))
        made += [*new, *(code.replace(**place(code)) for code in codes)]
        moved.append(old)
    return made, _given(scan, [scan.slices(x, v) for v, x in values.items()], moved)


def _given(
    construct: Construct, inputs: Sequence[Input], moved: Sequence[JaxprEqn]
) -> Construct:
    """Passes into the first body what moved equations made there."""
    if not moved:
        return construct
    # By identity: equations have no equality, and equal ones are several.
    gone = set(map(id, moved))
    left = [eqn for eqn in equations(construct.bodies[0]) if id(eqn) not in gone]
    return dataclasses.replace(
        construct.with_body(0, eqns=left), inputs=(*construct.inputs, *inputs)
    )
