"""Codes that a scan or a call would be given twice are given once.

Quantizations that leave two bodies, one within the other, are found to be equal where
they meet. The outer body then has the same codes twice, and a loop would slice both.
"""

from typing import Any

from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._program import Program
from fp8jax.transform._stacks import without_inputs
from fp8jax.transform.ir import jaxprs_of, with_jaxprs

# Their operands are those of their one jaxpr.
CALLS = ("checkpoint", "closed_call", "eval_jaxpr", "remat", "remat2")


def dedupe(program: Program) -> Program:
    """The same program, no scan or call in it with the same codes twice."""
    done: dict[tuple[int, tuple[bool, ...]], Any] = {}

    def visit(jaxpr: Any, is_codes: tuple[bool, ...]) -> Any:
        key = id(jaxpr), is_codes
        if key not in done:
            done[key] = _visit(jaxpr, is_codes)
        return done[key]

    def _visit(jaxpr: Any, is_codes: tuple[bool, ...]) -> Any:
        inner = _compat.open_jaxpr(jaxpr)
        codes = {v for v, known in zip(inner.invars, is_codes, strict=True) if known}
        eqns = []
        for old in inner.eqns:
            mark = ops.mark_of(old)
            if mark is not None and mark.startswith("quantize"):
                codes.update(old.outvars)
            eqns.append(_with_visited(old, codes) if mark is None else old)
        if all(a is b for a, b in zip(inner.eqns, eqns, strict=True)):
            return jaxpr
        return _compat.with_parts(jaxpr, eqns=eqns)

    def _with_visited(eqn: Any, codes: set[Any]) -> Any:
        flags = []
        if eqn.primitive.name in ("scan", *CALLS):
            eqn = _without_second(eqn, codes)
            flags = [isinstance(x, core.Var) and x in codes for x in eqn.invars]
        subs = jaxprs_of(eqn)
        visited = []
        for sub in subs:
            count = len(_compat.open_jaxpr(sub).invars)
            known = tuple(flags) if len(flags) == count else (False,) * count
            visited.append(visit(sub, known))
        if all(a is b for a, b in zip(subs, visited, strict=True)):
            return eqn
        return with_jaxprs(eqn, visited)

    jaxpr = program.jaxpr
    nothing = (False,) * len(_compat.open_jaxpr(jaxpr).invars)
    return program.of(visit(jaxpr, nothing))


def _without_second(eqn: Any, codes: set[Any]) -> Any:
    """The equation without operands that are others' codes again."""
    (jaxpr,) = jaxprs_of(eqn)
    body = _compat.open_jaxpr(jaxpr)
    n_consts, start = len(eqn.invars), len(eqn.invars)
    if eqn.primitive.name == "scan":
        n_consts, n_carry = _compat.scan_counts(eqn.params)
        start = n_consts + n_carry
    first: dict[Any, Any] = {}
    env: dict[Any, Any] = {}
    gone = []
    for i, (v, x) in enumerate(zip(body.invars, eqn.invars, strict=True)):
        if not isinstance(x, core.Var) or x not in codes or n_consts <= i < start:
            continue
        same = first.setdefault((x, i < n_consts), v)
        if same is not v:
            env[v] = same
            gone.append(i)
    if not gone:
        return eqn

    def read(x: Any) -> Any:
        return x if isinstance(x, core.Literal) else env.get(x, x)

    jaxpr = _compat.with_parts(
        jaxpr,
        eqns=[old.replace(invars=[read(x) for x in old.invars]) for old in body.eqns],
        outvars=[read(x) for x in body.outvars],
    )
    if eqn.primitive.name == "scan":
        consts = sum(i < n_consts for i in gone)
        params = _compat.with_scan_consts(eqn.params, -consts)
        params = _compat.with_scan_slices(params, consts - len(gone))
    else:
        stays = [i for i, _ in enumerate(eqn.invars) if i not in gone]
        params = _compat.with_some_call_operands(eqn.params, stays)
    new = with_jaxprs(eqn.replace(params=params), [jaxpr])
    return without_inputs(new, set(env))
