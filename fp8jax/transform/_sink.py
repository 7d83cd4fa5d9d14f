"""Takes dequantizations to the products that use them: through indexing, into bodies.

A scan over layers then reads a slice of the codes, and not one of an inflated stack.
"""

from typing import Any

import jax
from jax.extend import core

from fp8jax import _compat
from fp8jax.transform._inline import written_out
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._program import Program
from fp8jax.transform._stored import Dequantize, bodies, kind_of
from fp8jax.transform.ir import with_jaxprs


def sink(program: Program) -> Program:
    """The same program; what a body reads as an array, it makes of codes itself.

    Of an entry of a stack of matrices, too, the codes are taken, and not the array.
    """
    return program.of(_sunk(program.jaxpr))


def _sunk(jaxpr: Any) -> Any:
    made: dict[Any, Any] = {}  # The array's variable: the equation that makes it.
    inner = _compat.open_jaxpr(jaxpr)
    results: dict[Any, Any] = {}  # Of calls that are written out.

    def read(x: Any) -> Any:
        return x if isinstance(x, core.Literal) else results.get(x, x)

    eqns, left, changed = [], list(inner.eqns), False
    while left:
        old = left.pop(0)
        eqn = old.replace(invars=[read(x) for x in old.invars]) if results else old
        # `jax.numpy` and `jax.lax` jit some of the functions that index.
        call = written_out(eqn) if _reads(eqn, made) else None
        if call is not None:
            left = [*call[0], *left]
            results.update(zip(eqn.outvars, call[1], strict=True))
            continue
        new = _of_entries(eqn, made) or [_with_codes(eqn, made)]
        if Dequantize.of(new[-1]) is not None:
            made[new[-1].outvars[0]] = new[-1]
        subs = [(sub, _sunk(sub)) for sub, _ in bodies(new[-1])]
        if any(a is not b for a, b in subs):
            new = [with_jaxprs(new[-1], [sub for _, sub in subs])]
        changed |= new[-1] is not old
        eqns += new
    if not changed:
        return jaxpr
    return _compat.with_parts(jaxpr, eqns=eqns, outvars=[*map(read, inner.outvars)])


def _reads(eqn: Any, made: dict[Any, Any]) -> bool:
    return any(isinstance(x, core.Var) and x in made for x in eqn.invars)


def _of_entries(eqn: Any, made: dict[Any, Any]) -> list[Any]:
    """Equations for entries of a stack that is made of codes; none if it is not so."""
    source: Any = eqn.invars[0] if eqn.invars else None
    if not isinstance(source, core.Var) or source not in made:
        return []
    call, inputs = Dequantize.of(made[source]), made[source].invars
    stack: Any = source.aval
    before = stack.ndim - 2  # Sides of the stack.
    name, params = eqn.primitive.name, eqn.params
    matrix = stack.shape[before:]
    out: Any = eqn.outvars[0].aval

    def take(x: jax.Array, indices: Any) -> jax.Array:
        sides = x.shape[before:]
        if name == "squeeze":
            return jax.lax.squeeze(x, params["dimensions"])
        if name == "slice":
            limits = (*params["limit_indices"][:before], *sides)
            return jax.lax.slice(x, params["start_indices"], limits, params["strides"])
        sizes = (*params["slice_sizes"][:before], *sides)
        return jax.lax.dynamic_slice(x, indices, sizes)

    if not (
        (name == "squeeze" and max(params["dimensions"], default=0) < before)
        or (name == "slice" and out.shape[before:] == matrix)
        or (name == "dynamic_slice" and params["slice_sizes"][before:] == matrix)
    ):
        return []

    def entries(data: jax.Array, scale: jax.Array, *indices: jax.Array) -> jax.Array:
        assert call is not None
        return call(take(data, indices), take(scale, indices))

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
    at = [x.aval for x in eqn.invars[1:]]
    traced = _compat.open_jaxpr(jax.make_jaxpr(entries)(*avals, *at))
    eqns, _ = splice(traced, [*inputs, *eqn.invars[1:]], moved_to(eqn))
    return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]


def _with_codes(eqn: Any, made: dict[Any, Any]) -> Any:
    """A construct that takes codes and scales where it took an array."""
    inside = list(bodies(eqn))
    taken = {
        i: made[x]
        for i, x in enumerate(eqn.invars)
        if inside and isinstance(x, core.Var) and x in made
        if kind_of(eqn, i) != "carry"
    }
    if not taken:
        return eqn
    invars = []
    for i, x in enumerate(eqn.invars):
        invars += taken[i].invars if i in taken else [x]
    subs = []
    for sub, slots in inside:
        inner = _compat.open_jaxpr(sub)
        inputs, first = [], []
        for v, i in zip(inner.invars, slots, strict=True):
            if i not in taken:
                inputs.append(v)
                continue
            call = _traced(taken[i], is_sliced=kind_of(eqn, i) == "slices")
            inputs += call.invars
            first.append(call.eqns[0].replace(outvars=[v]))
        subs.append(_compat.with_parts(sub, invars=inputs, eqns=[*first, *inner.eqns]))
    eqn = eqn.replace(params=_with_more(eqn, taken), invars=invars)
    return with_jaxprs(eqn, subs)


def _traced(eqn: Any, is_sliced: bool) -> Any:
    """The dequantization of what a body sees, as a jaxpr of its own."""
    call = Dequantize.of(eqn)
    assert call is not None
    avals = [
        jax.ShapeDtypeStruct(v.aval.shape[is_sliced:], v.aval.dtype) for v in eqn.invars
    ]
    return _compat.open_jaxpr(jax.make_jaxpr(call)(*avals))


def _with_more(eqn: Any, taken: dict[int, Any]) -> dict[str, Any]:
    """The construct's parameters, with one operand more for each that is taken."""
    params = dict(eqn.params)
    if eqn.primitive.name == "scan":
        slices = sum(kind_of(eqn, i) == "slices" for i in taken)
        params = _compat.with_scan_consts(params, len(taken) - slices)
        return _compat.with_scan_slices(params, slices)
    if eqn.primitive.name == "while":
        n_cond = params["cond_nconsts"]
        of_cond = sum(i < n_cond for i in taken)
        params["cond_nconsts"] += of_cond
        params["body_nconsts"] += len(taken) - of_cond
        return params
    return _compat.with_call_operands(params, len(taken))
