"""Takes quantizations of what a loop does not change out of the loop.

A scan over microbatches closes over its weights: their codes are made once, before it.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._interpreter import (
    moved_to,
    splice,
    sub_jaxprs,
    with_sub_jaxprs,
)

_QUANTIZATIONS = tuple(
    f"{ops.MARK}{name}" for name in ("quantize", "quantize_both", "moments")
)
# What may lie between a weight and its codes, and between codes and a product.
_VIEWS = ("convert_element_type", "reshape", "squeeze", "transpose")


def hoist(jaxpr: Any) -> Any:
    """The same program, with loop-invariant quantizations before their loops."""
    done: dict[int, Any] = {}

    def visit(jaxpr: Any) -> Any:
        if id(jaxpr) not in done:
            old = list(_compat.open_jaxpr(jaxpr).eqns)
            new = [made for eqn in old for made in _eqns(eqn)]
            is_same = list(map(id, old)) == list(map(id, new))
            done[id(jaxpr)] = jaxpr if is_same else _compat.with_parts(jaxpr, eqns=new)
        return done[id(jaxpr)]

    def _eqns(eqn: Any) -> list[Any]:
        if _name(eqn).startswith(ops.MARK):
            return [eqn]
        subs = sub_jaxprs(eqn)
        visited = [visit(sub) for sub in subs]
        if any(a is not b for a, b in zip(subs, visited, strict=True)):
            eqn = with_sub_jaxprs(eqn, visited)
        return _before_loop(eqn) if eqn.primitive.name == "scan" else [eqn]

    return visit(jaxpr)


def _name(eqn: Any) -> str:
    return str(eqn.params.get("name", ""))


def _before_loop(scan: Any) -> list[Any]:
    """The scan, and before it the equations of its body that may go there."""
    n_consts, _ = _compat.scan_counts(scan.params)
    body = _compat.open_jaxpr(scan.params["jaxpr"])
    consts = body.invars[:n_consts]
    moved = _invariant(body, consts)
    if not moved:
        return [scan]
    stays = [eqn for eqn in body.eqns if not any(eqn is m for m in moved)]
    made = dict.fromkeys(v for eqn in moved for v in eqn.outvars)
    needed = list(
        dict.fromkeys(
            x
            for x in (*(x for eqn in stays for x in eqn.invars), *body.outvars)
            if isinstance(x, core.Var) and x in made
        )
    )
    program = body.replace(
        invars=consts, outvars=needed, eqns=moved, constvars=(), effects=frozenset()
    )
    eqns, values = splice(program, scan.invars[:n_consts], moved_to(scan))
    invars = [*consts, *needed, *body.invars[n_consts:]]
    jaxpr = _compat.with_parts(scan.params["jaxpr"], invars=invars, eqns=stays)
    params = {**_compat.with_scan_consts(scan.params, len(needed)), "jaxpr": jaxpr}
    operands = [*scan.invars[:n_consts], *values, *scan.invars[n_consts:]]
    return [*eqns, scan.replace(params=params, invars=operands)]


def _invariant(body: Any, consts: Sequence[Any]) -> list[Any]:
    """Quantizations of constants, with the views before and after them, in order."""
    views: dict[Any, Any] = {}  # Of constants: the equation that makes it.
    known, moved = set(consts), []
    codes: set[Any] = set()

    def is_known(x: Any) -> bool:
        return isinstance(x, core.Literal) or x in known or x in views or x in codes

    def take(x: Any) -> None:
        """Moves the views that lead to `x`."""
        eqn = views.pop(x, None) if isinstance(x, core.Var) else None
        if eqn is not None:
            known.update(eqn.outvars)
            for y in eqn.invars:
                take(y)
            moved.append(eqn)

    for eqn in body.eqns:
        if not all(map(is_known, eqn.invars)):
            continue
        if _name(eqn) in _QUANTIZATIONS:
            for x in eqn.invars:
                take(x)
            moved.append(eqn)
            codes.update(eqn.outvars)
        elif eqn.primitive.name in _VIEWS and eqn.invars:
            if any(isinstance(x, core.Var) and x in codes for x in eqn.invars):
                moved.append(eqn)
                codes.update(eqn.outvars)
            else:
                views.update(dict.fromkeys(eqn.outvars, eqn))
    return moved
