"""Writes nested jitted functions that hold matrix products out where they are called.

`jnp.einsum` and others jit themselves. A value that two of them multiply by, or that a
forward and a backward call share, is then one variable of one jaxpr: it is quantized
once for all of them.

A function with a gradient rule of its own is written out where its derivative is taken
already, for there the rule means nothing any more: in the forward half of its own rule,
say, which may call the function itself, as those in JAX's documentation do.
"""

from typing import Any

from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._interpreter import splice, sub_jaxprs, with_sub_jaxprs
from fp8jax.transform._ragged_form import RAGGED
from fp8jax.transform._values import HAND_WRITTEN_CALLS

_JITS = ("jit", "pjit")
_PRODUCTS = ("dot_general", RAGGED)
# Constructs whose jaxprs may change; all others stay as they came.
_ENTERED = (
    "checkpoint",
    "closed_call",
    "cond",
    "eval_jaxpr",
    "remat",
    "remat2",
    "scan",
    "shard_map",
    "while",
)


def inline_calls(jaxpr: Any, differentiated: bool = False) -> Any:
    """The same program, without calls of plain jitted functions with products.

    Names of the equations within get those of the call before them. A function with
    shardings, donation or compiler options of its own stays a call, and so do ours.

    Args:
        jaxpr: the program.
        differentiated: whether derivatives of all of it are taken already; else of
            what has names that say so.
    """
    done: dict[tuple[int, bool], Any] = {}
    holds: dict[int, bool] = {}

    def has_products(jaxpr: Any) -> bool:
        if id(jaxpr) not in holds:
            holds[id(jaxpr)] = any(
                eqn.primitive.name in _PRODUCTS
                or (not _is_ours(eqn) and any(map(has_products, sub_jaxprs(eqn))))
                for eqn in _compat.open_jaxpr(jaxpr).eqns
            )
        return holds[id(jaxpr)]

    def visit(jaxpr: Any, differentiated: bool) -> Any:
        if not has_products(jaxpr):
            return jaxpr
        key = id(jaxpr), differentiated
        if key not in done:
            done[key] = _visit(jaxpr, differentiated)
        return done[key]

    def _visit(jaxpr: Any, differentiated: bool) -> Any:
        inner = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, core.Literal) else env.get(atom, atom)

        eqns = []
        for eqn in inner.eqns:
            eqn = eqn.replace(invars=[read(x) for x in eqn.invars]) if env else eqn
            name = eqn.primitive.name
            names = _compat.names_of(eqn)
            within = differentiated or any(part.is_derivative for part in names)
            calls = (*_JITS, *HAND_WRITTEN_CALLS) if within else _JITS
            is_entered = name in (*_ENTERED, *calls) and not _is_ours(eqn)
            subs = sub_jaxprs(eqn) if is_entered else []
            if not any(map(has_products, subs)):
                eqns.append(eqn)
                continue
            subs = [visit(sub, within) for sub in subs]
            body = _compat.open_jaxpr(subs[0])
            if name not in calls or not _is_plain(eqn, body):
                eqns.append(with_sub_jaxprs(eqn, subs))
                continue
            made, results = splice(body, eqn.invars, _named_after(eqn))
            eqns += made
            env.update(zip(eqn.outvars, results, strict=True))
        outvars = [read(x) for x in inner.outvars]
        return _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars)

    return visit(jaxpr, differentiated)


def written_out(eqn: Any) -> tuple[list[Any], list[Any]] | None:
    """A plain call's equations and results; None for all else, and for ours."""
    if eqn.primitive.name not in _JITS or _is_ours(eqn):
        return None
    body = _compat.open_jaxpr(eqn.params["jaxpr"])
    if not _is_plain(eqn, body):
        return None
    return splice(body, eqn.invars, _named_after(eqn))


def _is_ours(eqn: Any) -> bool:
    return ops.mark_of(eqn) is not None


def _is_plain(eqn: Any, body: Any) -> bool:
    """Whether the call means no more than its equations."""
    if eqn.primitive.name in HAND_WRITTEN_CALLS:
        return not body.constvars
    return not body.constvars and _compat.is_plain_call(eqn.params)


def _named_after(call: Any) -> Any:
    """For `splice`: equations stay where they are, under the call's names."""
    outer = call.source_info.name_stack

    def place(eqn: Any) -> dict[str, Any]:
        names = outer + eqn.source_info.name_stack
        return {"source_info": eqn.source_info.replace(name_stack=names)}

    return place
