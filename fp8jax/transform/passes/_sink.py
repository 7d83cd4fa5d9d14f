"""Takes dequantizations to the products that use them: through indexing, into bodies.

A scan over layers then reads a slice of the codes, and not one of an inflated stack.
"""

import dataclasses
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.call import Dequantize
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    Construct,
    aval_of,
    construct_of,
    entries_of,
    equations,
    memoized,
    moved_to,
    read,
    reading,
    splice,
    with_equations,
    written_out,
)
from fp8jax.transform.lower import Program


def sink(program: Program) -> Program:
    """Moves dequantizations into the bodies that read the arrays.

    Of an entry of a stack of matrices, too, the codes are taken, and not the array.
    """
    calls = program.calls

    @memoized
    def visit(jaxpr: AnyJaxpr) -> AnyJaxpr:
        made: dict[
            Var, JaxprEqn
        ] = {}  # The array's variable: the equation that makes it.
        results: dict[Var, Atom] = {}  # Of calls that are written out.
        eqns, left = [], equations(jaxpr)
        while left:
            eqn = reading(left.pop(0), results)
            # `jax.numpy` and `jax.lax` jit some of the functions that index.
            call = construct_of(eqn) if _reads(eqn, made) else None
            if call is not None and call.is_plain:
                written, outvars = written_out(call)
                left = [*written, *left]
                results.update(zip(eqn.outvars, outvars, strict=True))
                continue
            # Entries are taken of the codes: the stack as an array would be the whole
            # model in bfloat16.
            *before, eqn = _of_entries(eqn, made, calls) or [eqn]
            if isinstance(calls.of(eqn), Dequantize):
                made[eqn.outvars[0]] = eqn
            construct = construct_of(eqn)
            if construct is not None:
                construct = _with_codes(construct, made, calls)
                eqn = construct.visited(visit).equation()
            eqns += [*before, eqn]
        outvars = [read(x, results) for x in _compat.open_jaxpr(jaxpr).outvars]
        return with_equations(jaxpr, eqns, outvars)

    return program.of(visit(program.jaxpr))


def _reads(eqn: JaxprEqn, made: dict[Var, JaxprEqn]) -> bool:
    return any(isinstance(x, core.Var) and x in made for x in eqn.invars)


def _of_entries(
    eqn: JaxprEqn, made: dict[Var, JaxprEqn], calls: Calls
) -> list[JaxprEqn]:
    """Takes entries of a stack's codes instead of its arrays; [] for all else."""
    source: Any = eqn.invars[0] if eqn.invars else None
    if not isinstance(source, core.Var) or source not in made:
        return []
    call, inputs = calls.of(made[source]), made[source].invars
    assert call is not None
    stack: Any = aval_of(source)
    take = entries_of(eqn, before=stack.ndim - 2)
    if take is None:
        return []

    def entries(data: jax.Array, scale: jax.Array, *indices: jax.Array) -> jax.Array:
        return call(take(data, *indices), take(scale, *indices))

    avals = [jax.ShapeDtypeStruct(aval_of(v).shape, aval_of(v).dtype) for v in inputs]
    at = [aval_of(x) for x in eqn.invars[1:]]
    traced = _compat.open_jaxpr(jax.make_jaxpr(entries)(*avals, *at))
    eqns, _ = splice(traced, [*inputs, *eqn.invars[1:]], moved_to(eqn))
    calls.add(eqns[-1], call)
    return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]


def _with_codes(
    construct: Construct, made: dict[Var, JaxprEqn], calls: Calls
) -> Construct:
    """Passes codes and scales into a construct instead of the array they make."""
    taken = {
        x: made[x.operand]
        for x in construct.inputs
        if isinstance(x.operand, core.Var)
        and x.operand in made
        and x.kind in ("constant", "slice")
    }
    # Where parameters place operands on devices, codes would need places of their own.
    if not taken or not construct.takes_inputs:
        return construct
    inputs = []
    first: list[list[Any]] = [[] for _ in construct.bodies]
    for x in construct.inputs:
        if x not in taken:
            inputs.append(x)
            continue
        codes = []  # For each body, the variables of codes and scales.
        for i, v in enumerate(x.inner):
            variables = [None, None]
            if v is not None:
                eqn, variables = _dequantization(taken[x], x.kind == "slice", calls)
                first[i].append(eqn.replace(outvars=[v]))
            codes.append(variables)
        operands = zip(taken[x].invars, zip(*codes, strict=True), strict=True)
        inputs += [
            dataclasses.replace(x, operand=operand, inner=tuple(inner))
            for operand, inner in operands
        ]
    for i, eqns in enumerate(first):
        construct = construct.with_body(
            i, eqns=[*eqns, *equations(construct.bodies[i])]
        )
    return dataclasses.replace(construct, inputs=tuple(inputs)).settled()


def _dequantization(
    eqn: JaxprEqn, is_sliced: bool, calls: Calls
) -> tuple[Any, list[Any]]:
    """Makes a body's own dequantization: the equation, and the variables it reads."""
    call = calls.of(eqn)
    assert isinstance(call, Dequantize)
    given = map(aval_of, eqn.invars)
    avals = [jax.ShapeDtypeStruct(x.shape[is_sliced:], x.dtype) for x in given]
    traced = _compat.open_jaxpr(jax.make_jaxpr(call)(*avals))
    # Equal calls are traced once: each has variables of its own.
    variables = [core.Var(aval_of(v)) for v in traced.invars]
    (made,), _ = splice(traced, variables, lambda _: {})
    calls.add(made, call)
    return made, variables
