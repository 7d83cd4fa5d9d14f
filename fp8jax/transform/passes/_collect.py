"""Brings results of equations in nested jaxprs out as results of the whole program.

A scan stacks them over its iterations, a loop of unknown length adds them up, a branch
that is not taken gives zeros, and the body of a `shard_map` adds them up over its
devices. What decides whether such a loop goes on keeps its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.quant import MOMENTS, sum_moments
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Construct,
    Input,
    Result,
    aval_of,
    casts_of_types,
    construct_of,
    equations,
    memoized,
    moved_to,
    splice,
)
from fp8jax.transform.lower import COLLECTED, Program

Where = Sequence[int | None]  # Of each call, which of the results after a body's own.
Found = list[Any]  # Variables; None for what cannot be brought out.


def collect(program: Program) -> Program:
    """Returns the moments of every measured product after the program's own results."""
    if not program.measures:
        return program

    @memoized
    def visit(jaxpr: AnyJaxpr) -> tuple[Any, Where]:
        inner = _compat.open_jaxpr(jaxpr)
        # Where types are explicit, a call's own result is of no explicit type yet.
        cast = casts_of_types(inner.eqns)
        eqns, found = [], []
        for eqn in inner.eqns:
            new, in_eqn = visit_eqn(eqn)
            eqns += new
            found += [cast.get(v, v) for v in in_eqn]
        if not found:
            return jaxpr, []
        # One result may be asked for twice: a body that is shared measures once.
        results = list(dict.fromkeys(v for v in found if v is not None))
        outvars = [*inner.outvars, *results]
        where = [None if v is None else results.index(v) for v in found]
        return _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars), where

    def visit_eqn(eqn: JaxprEqn) -> tuple[list[JaxprEqn], Found]:
        if isinstance(program.calls.of(eqn), COLLECTED):
            return [eqn], [eqn.outvars[0]]
        construct = construct_of(eqn)
        if construct is None:
            return [eqn], []
        visited = [visit(body) for body in construct.bodies]
        if not any(where for _, where in visited):
            return [eqn], []
        wheres = [where for _, where in visited]
        # A loop's condition returns one boolean and no more: what it measures stays
        # inside, and the report says so.
        bodies = [body for i, (body, _) in enumerate(visited) if construct.returns(i)]
        kept = construct.bodies[len(bodies) :]
        construct = dataclasses.replace(construct, bodies=(*bodies, *kept))
        if construct.chooses:
            return _of_branches(construct, wheres)
        # In the body, where the axes have names to sum over.
        if construct.manual_axes is not None:
            construct = _summed(construct)
        if construct.iterates and construct.length is None:
            return _of_loop(construct, wheres)
        more = [construct.result(v) for v in _new_results(construct, 0)]
        return [_with_results(construct, more)], _outside(more, wheres[0])

    jaxpr, where = visit(program.jaxpr)
    return dataclasses.replace(program, jaxpr=jaxpr, collected=tuple(where))


def _new_results(construct: Construct, body: int) -> list[Any]:
    """What a visited body returns after its own results."""
    return _compat.open_jaxpr(construct.bodies[body]).outvars[len(construct.results) :]


def _with_results(construct: Construct, more: Sequence[Result]) -> JaxprEqn:
    results = (*construct.results, *more)
    return dataclasses.replace(construct, results=results).equation()


def _outside(more: Sequence[Result], where: Where) -> Found:
    return [None if i is None else more[i].outvar for i in where]


def _of_loop(loop: Construct, wheres: Sequence[Where]) -> tuple[list[JaxprEqn], Found]:
    """Carries the sum of all iterations' moments: an unknown number cannot be stacked.

    The condition is given the carry as well, as it is every one, and leaves it unread.
    """
    eqn, before, eqns = loop.eqn, [], equations(loop.bodies[0])
    inputs, more = [], []
    for v in _new_results(loop, 0):
        so_far, unread = core.Var(v.aval), core.Var(v.aval)
        with _compat.TracingContext.of(eqn).entered():
            traced = jax.make_jaxpr(lambda *x: sum_moments(x))(v.aval, v.aval)
        made, (total,) = splice(_compat.open_jaxpr(traced), [so_far, v], moved_to(eqn))
        eqns += made
        made, (init,) = _zeros_like(v, eqn)
        before += made
        inputs.append(Input(init, (so_far, unread), "carry"))
        more.append(Result(core.Var(v.aval), (total, None), "carry"))
    loop = loop.with_body(0, eqns=eqns)
    loop = dataclasses.replace(loop, inputs=(*loop.inputs, *inputs))
    of_condition = [None for _ in wheres[1]]
    return [*before, _with_results(loop, more)], [
        *_outside(more, wheres[0]),
        *of_condition,
    ]


def _of_branches(
    cond: Construct, wheres: Sequence[Where]
) -> tuple[list[JaxprEqn], Found]:
    """Gives each branch zeros for what the others measure: they count nothing."""
    results = [_new_results(cond, i) for i, _ in enumerate(cond.bodies)]
    bodies = [equations(body) for body in cond.bodies]
    more, found = [], []
    for branch, (those, where) in enumerate(zip(results, wheres, strict=True)):
        here = []
        for v in those:
            inner = []
            for other, eqns in enumerate(bodies):
                made, (out,) = (
                    ([], [v]) if other == branch else _zeros_like(v, cond.eqn)
                )
                eqns += made
                inner.append(out)
            here.append(cond.result(*inner))
        more += here
        found += _outside(here, where)
    for i, eqns in enumerate(bodies):
        cond = cond.with_body(i, eqns=eqns)
    return [_with_results(cond, more)], found


def _zeros_like(v: Atom, place: JaxprEqn) -> tuple[list[JaxprEqn], list[Any]]:
    """Makes zeros of a variable's type: equations and result."""

    def zeros() -> jax.Array:
        x = jnp.zeros(aval_of(v).shape, aval_of(v).dtype)
        varying = tuple(_compat.varying_axes(v.aval))
        # Branches must agree on their types, the axes that values vary over included.
        return lax.pcast(x, varying, to="varying") if varying else x

    with _compat.TracingContext.of(place).entered():
        traced = _compat.open_jaxpr(jax.make_jaxpr(zeros)())
    return splice(traced, (), moved_to(place))


def _summed(construct: Construct) -> Construct:
    """Sums a `shard_map`'s moments over its devices, in the body."""
    axes = tuple(construct.manual_axes or ())
    body = _compat.open_jaxpr(construct.bodies[0])
    eqns = list(body.eqns)
    outvars = list(body.outvars[: len(construct.results)])
    place = moved_to(eqns[-1])
    for v in _new_results(construct, 0):
        varying = _compat.varying_axes(v.aval)

        def sum_over_devices(
            x: jax.Array, varying: frozenset[str] = varying
        ) -> jax.Array:
            # `psum` refuses to sum over several axes of which a value varies over some.
            missing = tuple(axis for axis in axes if axis not in varying)
            if missing and varying:
                x = lax.pcast(x, missing, to="varying")
            # All moments are sums but the last, the largest magnitude.
            assert len(MOMENTS) == x.shape[-1]
            sums, amax = lax.psum(x[..., :-1], axes), lax.pmax(x[..., -1:], axes)
            return jnp.concatenate([sums, amax], -1)

        with _compat.TracingContext.inside(construct.eqn, bool(varying)).entered():
            traced = _compat.open_jaxpr(jax.make_jaxpr(sum_over_devices)(v.aval))
        made, outs = splice(traced, [v], place)
        eqns += made
        outvars += outs
    return construct.with_body(0, eqns=eqns, outvars=outvars)
