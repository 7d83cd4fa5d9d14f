"""Makes the codes for wgrad in the forward scan that keeps their operand.

A scan over layers stacks each layer's input for its backward scan, which quantizes a
slice of it at a time. With `residual="fp8"` the forward scan stacks the codes instead.
"""

import dataclasses
from typing import Any

from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._calls import EARLY
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._program import Program
from fp8jax.transform._views import chain_of, views_in
from fp8jax.transform.ir import jaxprs_of, with_jaxprs


def carry_codes(program: Program) -> Program:
    """The same program, with `EARLY` calls in forward scans, where that is possible."""
    done: dict[int, Any] = {}

    def visit(jaxpr: Any) -> Any:
        if id(jaxpr) not in done:
            done[id(jaxpr)] = _visit(jaxpr)
        return done[id(jaxpr)]

    def _visit(jaxpr: Any) -> Any:
        eqns, changed = [], False
        made_by: dict[Any, int] = {}  # Results of scans: which equation's.
        for old in _compat.open_jaxpr(jaxpr).eqns:
            eqn = _with_visited(old)
            if eqn.primitive.name == "scan":
                for early in _early_calls(eqn):
                    index = made_by.get(early.stacked)
                    if index is not None:
                        eqns[index], eqn = _carried(eqns[index], eqn, early)
                made_by.update(dict.fromkeys(eqn.outvars, len(eqns)))
            changed |= eqn is not old
            eqns.append(eqn)
        return _compat.with_parts(jaxpr, eqns=eqns) if changed else jaxpr

    def _with_visited(eqn: Any) -> Any:
        if ops.mark_of(eqn) is not None:
            return eqn
        subs = jaxprs_of(eqn)
        visited = [visit(sub) for sub in subs]
        if all(a is b for a, b in zip(subs, visited, strict=True)):
            return eqn
        return with_jaxprs(eqn, visited)

    return program.of(visit(program.jaxpr))


@dataclasses.dataclass(frozen=True)
class _Early:
    """A call in a scan's body that depends on a slice of one stacked array alone.

    Attributes:
        stacked: the array, where the scan is.
        slice: of it, in the body.
        eqns: views of the slice, and the call.
    """

    stacked: Any
    slice: Any
    eqns: tuple[Any, ...]


def _early_calls(scan: Any) -> list[_Early]:
    body = _compat.open_jaxpr(scan.params["jaxpr"])
    before = sum(_compat.scan_counts(scan.params))
    stacked = dict(zip(body.invars[before:], scan.invars[before:], strict=True))
    views = views_in(body.eqns)
    found = []
    for eqn in body.eqns:
        if ops.mark_of(eqn) != EARLY:
            continue
        x, chain = chain_of(eqn.invars[0], views)
        if isinstance(stacked.get(x), core.Var):
            found.append(_Early(stacked[x], x, (*chain, eqn)))
    return found


def _carried(forward: Any, backward: Any, early: _Early) -> tuple[Any, Any]:
    """Both scans, with the call in the forward one's body."""
    call = early.eqns[-1]
    body = _compat.open_jaxpr(forward.params["jaxpr"])
    kept = body.outvars[forward.outvars.index(early.stacked)]
    program = body.replace(
        constvars=(),
        invars=[early.slice],
        eqns=list(early.eqns),
        outvars=call.outvars,
        effects=frozenset(),
    )
    # Where the value was made, or the scan's own place if it came in from outside.
    places = [eqn for eqn in body.eqns if any(kept is v for v in eqn.outvars)]
    eqns, codes = splice(program, [kept], moved_to((places or [forward])[-1]))
    length = forward.params["length"]
    stacked = [core.Var(_compat.stacked_aval(v.aval, length)) for v in codes]
    params = _compat.with_results(forward.params, len(codes))
    params["jaxpr"] = _compat.with_parts(
        forward.params["jaxpr"],
        eqns=[*body.eqns, *eqns],
        outvars=[*body.outvars, *codes],
    )
    new_forward = forward.replace(params=params, outvars=[*forward.outvars, *stacked])

    inner = _compat.open_jaxpr(backward.params["jaxpr"])
    stays = [eqn for eqn in inner.eqns if eqn is not call]
    invars, operands = [*inner.invars, *call.outvars], [*backward.invars, *stacked]
    params = _compat.with_scan_slices(backward.params, len(stacked))
    params["jaxpr"] = _compat.with_parts(
        backward.params["jaxpr"], eqns=stays, invars=invars
    )
    return new_forward, backward.replace(params=params, invars=operands)
