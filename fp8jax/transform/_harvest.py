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

from fp8jax import _compat, ops
from fp8jax.quant import MOMENTS, sum_moments
from fp8jax.transform._calls import STATISTICS
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._program import Program
from fp8jax.transform._values import HAND_WRITTEN_CALLS
from fp8jax.transform.ir import jaxprs_of, with_jaxprs

Found = list[Any]  # Variables; None for what cannot be brought out.

_CALLS = (
    "checkpoint",
    "closed_call",
    "core_call",
    "eval_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
)


def harvest(program: Program) -> Program:
    """The program with the results of all `STATISTICS` calls after its own."""
    if not program.measures:
        return program
    done: dict[int, tuple[Any, list[int | None]]] = {}

    def visit(jaxpr: Any) -> tuple[Any, list[int | None]]:
        if id(jaxpr) not in done:
            done[id(jaxpr)] = _visit(jaxpr)
        return done[id(jaxpr)]

    def _visit(jaxpr: Any) -> tuple[Any, list[int | None]]:
        inner = _compat.open_jaxpr(jaxpr)
        # Where types are explicit, a call's own result is of no explicit type yet.
        cast = {
            eqn.invars[0]: eqn.outvars[0]
            for eqn in inner.eqns
            if eqn.primitive.name in ("mesh_cast", "reshard")
            and isinstance(eqn.invars[0], core.Var)
        }
        eqns, found = [], []
        for eqn in inner.eqns:
            new, in_eqn = _visit_eqn(eqn)
            eqns += new
            found += [cast.get(v, v) for v in in_eqn]
        if not found:
            return jaxpr, []
        results = list(dict.fromkeys(v for v in found if v is not None))
        outvars = [*inner.outvars, *results]
        where = [None if v is None else results.index(v) for v in found]
        return _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars), where

    def _visit_eqn(eqn: Any) -> tuple[list[Any], Found]:
        mark = ops.mark_of(eqn)
        if mark == STATISTICS:
            return [eqn], [eqn.outvars[0]]
        if mark is not None or eqn.primitive.name in HAND_WRITTEN_CALLS:
            return [eqn], []
        visited = [visit(jaxpr) for jaxpr in jaxprs_of(eqn)]
        count = sum(len(where) for _, where in visited)
        primitive = eqn.primitive.name
        if not count:
            return [eqn], []
        if primitive in _CALLS or primitive == "scan":
            return _with_those_of(eqn, *visited[0])
        if primitive == "cond":
            return _with_those_of_branches(eqn, visited)
        if primitive == "shard_map":
            return _with_those_of(eqn, _summed(*visited[0], eqn), visited[0][1])
        if primitive == "while":
            (body, where), (_, in_cond) = visited
            if any(i is not None for i in where):
                new, found = _with_those_of_while(eqn, body, where)
                return new, [*found, *[None] * len(in_cond)]
        return [eqn], [None] * count

    jaxpr, where = visit(program.jaxpr)
    return dataclasses.replace(program, jaxpr=jaxpr, collected=tuple(where))


def _with_those_of(
    eqn: Any, jaxpr: Any, where: Sequence[int | None]
) -> tuple[list[Any], Found]:
    """The equation with its new jaxpr, and variables for what that brings out."""
    outvars = _compat.open_jaxpr(jaxpr).outvars[len(eqn.outvars) :]
    length = eqn.params.get("length")
    avals = (v.aval for v in outvars)
    if length is not None:
        avals = (_compat.stacked_aval(aval, length) for aval in avals)
    more = [core.Var(aval) for aval in avals]
    params = _compat.with_results(eqn.params, len(more))
    new = with_jaxprs(eqn.replace(params=params), [jaxpr])
    new = new.replace(outvars=[*eqn.outvars, *more])
    return [new], [None if i is None else more[i] for i in where]


def _with_those_of_while(
    eqn: Any, jaxpr: Any, where: Sequence[int | None]
) -> tuple[list[Any], Found]:
    """The loop carries the moments of all iterations so far."""
    own = len(eqn.outvars)
    inner = _compat.open_jaxpr(jaxpr)
    eqns, totals, before, inits = list(inner.eqns), [], [], []
    sums_before = [core.Var(v.aval) for v in inner.outvars[own:]]
    for old, v in zip(sums_before, inner.outvars[own:], strict=True):
        with _compat.TracingContext.of(eqn).entered():
            traced = jax.make_jaxpr(lambda *x: sum_moments(x))(old.aval, v.aval)
        made, total = splice(_compat.open_jaxpr(traced), [old, v], moved_to(eqn))
        eqns += made
        totals += total
        made, init = _zeros_like(v, eqn)
        before += made
        inits += init
    body = _compat.with_parts(
        jaxpr,
        invars=[*inner.invars, *sums_before],
        eqns=eqns,
        outvars=[*inner.outvars[:own], *totals],
    )
    cond = eqn.params["cond_jaxpr"]
    unread = [core.Var(v.aval) for v in sums_before]
    invars = [*_compat.open_jaxpr(cond).invars, *unread]
    more = [core.Var(v.aval) for v in sums_before]
    new = with_jaxprs(eqn, [body, _compat.with_parts(cond, invars=invars)])
    new = new.replace(invars=[*eqn.invars, *inits], outvars=[*eqn.outvars, *more])
    return [*before, new], [None if i is None else more[i] for i in where]


def _with_those_of_branches(
    eqn: Any, visited: Sequence[tuple[Any, list[int | None]]]
) -> tuple[list[Any], Found]:
    own = len(eqn.outvars)
    results = [_compat.open_jaxpr(jaxpr).outvars[own:] for jaxpr, _ in visited]
    branches = []
    for branch, (jaxpr, _) in enumerate(visited):
        inner = _compat.open_jaxpr(jaxpr)
        eqns, outvars = list(inner.eqns), list(inner.outvars[:own])
        for other, those in enumerate(results):
            if other == branch:
                outvars += those
                continue
            for v in those:  # Nothing was counted: all are zero.
                made, outs = _zeros_like(v, eqn)
                eqns += made
                outvars += outs
        branches.append(_compat.with_parts(jaxpr, eqns=eqns, outvars=outvars))
    more = [core.Var(v.aval) for those in results for v in those]
    new = with_jaxprs(eqn, branches).replace(outvars=[*eqn.outvars, *more])
    found, start = [], 0
    for those, (_, where) in zip(results, visited, strict=True):
        found += [None if i is None else more[start + i] for i in where]
        start += len(those)
    return [new], found


def _zeros_like(v: Any, place: Any) -> tuple[list[Any], list[Any]]:
    """Equations for zeros of a variable's type, and them."""

    def zeros() -> jax.Array:
        x = jnp.zeros(v.aval.shape, v.aval.dtype)
        varying = tuple(_compat.varying_axes(v.aval))
        return lax.pcast(x, varying, to="varying") if varying else x

    with _compat.TracingContext.of(place).entered():
        traced = _compat.open_jaxpr(jax.make_jaxpr(zeros)())
    return splice(traced, (), moved_to(place))


def _summed(jaxpr: Any, where: Sequence[int | None], eqn: Any) -> Any:
    """A `shard_map`'s body, whose moments are those of all devices together."""
    inner = _compat.open_jaxpr(jaxpr)
    own = len(eqn.outvars)
    if not any(i is not None for i in where):
        return jaxpr
    place = inner.eqns[-1]
    axes = tuple(_compat.manual_axes(eqn.params))
    eqns, outvars = list(inner.eqns), list(inner.outvars[:own])
    for v in inner.outvars[own:]:
        varying = _compat.varying_axes(v.aval)

        def sum_over_devices(x: jax.Array, varying: Any = varying) -> jax.Array:
            missing = tuple(axis for axis in axes if axis not in varying)
            if missing and varying:
                x = lax.pcast(x, missing, to="varying")
            assert len(MOMENTS) == x.shape[-1]
            sums, amax = lax.psum(x[..., :-1], axes), lax.pmax(x[..., -1:], axes)
            return jnp.concatenate([sums, amax], -1)

        with _compat.TracingContext.inside(eqn, bool(varying)).entered():
            traced = _compat.open_jaxpr(jax.make_jaxpr(sum_over_devices)(v.aval))
        made, outs = splice(traced, [v], moved_to(place))
        eqns += made
        outvars += outs
    return _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars)
