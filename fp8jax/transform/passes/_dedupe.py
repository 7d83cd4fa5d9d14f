"""Gives a scan or a call once what it would be given twice: the same codes.

Quantizations that leave two bodies, one within the other, are found to be equal where
they meet. The outer body then has the same codes twice, and a loop would slice both.
"""

import dataclasses
from typing import Any, TypeGuard

from jax.extend import core
from jax.extend.core import Var

from fp8jax import _compat
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Construct,
    construct_of,
    memoized,
    read,
    reading,
    with_equations,
)
from fp8jax.transform.lower import MAKING_CODES, Program


def dedupe(program: Program) -> Program:
    """Drops operands of scans and calls that are codes they have already."""

    @memoized
    def visit(jaxpr: AnyJaxpr, is_codes: tuple[bool, ...]) -> AnyJaxpr:
        inner = _compat.open_jaxpr(jaxpr)
        codes = {v for v, known in zip(inner.invars, is_codes, strict=True) if known}
        eqns = []
        for eqn in inner.eqns:
            if isinstance(program.calls.of(eqn), MAKING_CODES):
                codes.update(eqn.outvars)
            construct = construct_of(eqn)
            # Before the visit of the body, whose constructs then see one variable.
            if construct is not None:
                construct = _without_second(construct, codes)
                construct = construct.visited(visit, _codes_in(construct, codes))
                eqn = construct.equation()
            eqns.append(eqn)
        return with_equations(jaxpr, eqns)

    # The program's own inputs are the user's arrays, none of which we made.
    nothing = (False,) * len(_compat.open_jaxpr(program.jaxpr).invars)
    return program.of(visit(program.jaxpr, nothing))


def _is_known(x: Atom, codes: set[core.Var]) -> TypeGuard[core.Var]:
    return isinstance(x, core.Var) and x in codes


def _has_them(construct: Construct) -> bool:
    """Whether it is a scan or a call: codes cross into its one body and no other."""
    return construct.takes_inputs and len(construct.bodies) == 1


def _codes_in(construct: Construct, codes: set[Var]) -> list[tuple[bool, ...]]:
    """For each body, which of its inputs are codes."""
    known = _has_them(construct)
    return [
        tuple(
            known and _is_known(x.operand, codes)
            for x in construct.inputs
            if x.inner[i] is not None
        )
        for i, _ in enumerate(construct.bodies)
    ]


def _without_second(construct: Construct, codes: set[Var]) -> Construct:
    """Drops operands that repeat the codes of another operand."""
    if not _has_them(construct):
        return construct
    first: dict[Any, Any] = {}
    env: dict[Var, Atom] = {}  # Of a variable of the body, the one with the same codes.
    for x in construct.inputs:
        # Equal carries may differ after one iteration.
        if x.kind != "carry" and _is_known(x.operand, codes):
            (inner,) = x.inner
            assert inner is not None, "codes cross into its one body"
            same = first.setdefault((x.operand, x.kind), inner)
            if same is not inner:
                env[inner] = same
    if not env:
        return construct
    body = _compat.open_jaxpr(construct.bodies[0])
    edited = dataclasses.replace(
        construct.with_body(0, eqns=[reading(eqn, env) for eqn in body.eqns]),
        inputs=tuple(x for x in construct.inputs if x.inner[0] not in env),
        results=tuple(
            dataclasses.replace(
                x, inner=tuple(read(v, env) for v in x.inner if v is not None)
            )
            for x in construct.results
        ),
    )
    return edited.settled()
