"""Takes quantizations of weights out of the loops and remat bodies around them.

A scan over microbatches closes over its weights, and a scan over layers reads a slice
of each: their codes are made once, before the loop, and a scan over layers then reads
slices of the codes, forward as backward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._dedupe import CALLS
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._make_calls import Calls
from fp8jax.transform._program import Program
from fp8jax.transform._stacks import Stacks
from fp8jax.transform._views import chain_of, views_in
from fp8jax.transform._weight_flags import Flags, add_results, flagged, inner_flags
from fp8jax.transform.ir import jaxprs_of, with_jaxprs


def hoist(program: Program) -> Program:
    """The same program, with quantizations where they run once.

    What a loop does not change leaves it. Slices of stacked arrays do only if those are
    weights: the codes of all of an activation's would be one more thing to keep.
    """
    calls = program.calls
    done: dict[tuple[int, Flags], Any] = {}

    def visit(jaxpr: Any, flags: Flags) -> Any:
        key = id(jaxpr), flags
        if key not in done:
            done[key] = _visit(jaxpr, flags)
        return done[key]

    def _visit(jaxpr: Any, flags: Flags) -> Any:
        old = list(_compat.open_jaxpr(jaxpr).eqns)
        weights = flagged(jaxpr, flags)
        stacks = Stacks()
        eqns: list[Any] = []
        for eqn in old:
            made = _with_outside(_with_visited(eqn, weights), weights, stacks, calls)
            for new in made:
                add_results(new, weights)
            weights.update(stacks.found_in(made[-1], weights))
            eqns += made
        if list(map(id, old)) == list(map(id, eqns)):
            return jaxpr
        return _compat.with_parts(jaxpr, eqns=eqns)

    def _with_visited(eqn: Any, weights: set[Any]) -> Any:
        if ops.mark_of(eqn) is not None:
            return eqn
        subs = jaxprs_of(eqn)
        visited = list(map(visit, subs, inner_flags(eqn, weights)))
        if all(a is b for a, b in zip(subs, visited, strict=True)):
            return eqn
        return with_jaxprs(eqn, visited)

    return program.of(visit(program.jaxpr, program.is_weight))


def _with_outside(
    eqn: Any, weights: set[Any], stacks: Stacks, calls: Calls
) -> list[Any]:
    """The equation, and before it those of its body that may go there."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        before, eqn = _slices_before(eqn, weights, stacks, calls)
        n_consts, _ = _compat.scan_counts(eqn.params)
        names = range(n_consts), (n_consts, n_consts)
        made, eqn = _before(eqn, *names, _compat.with_scan_consts, calls)
        return [*before, *made, eqn]
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        places = range(n_cond, n_cond + n_body), (n_body, n_cond + n_body)
        made, eqn = _before(eqn, *places, _with_while_consts, calls)
        return [*made, eqn]
    if name in CALLS:
        known = [i for i, x in enumerate(eqn.invars) if _is_in(x, weights)]
        end = len(eqn.invars), len(eqn.invars)
        made, eqn = _before(eqn, known, end, _compat.with_call_operands, calls)
        return [*made, eqn]
    return [eqn]


def _is_in(x: Any, variables: set[Any]) -> bool:
    return isinstance(x, core.Var) and x in variables


def _with_while_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    return {**params, "body_nconsts": params["body_nconsts"] + count}


def _before(
    eqn: Any,
    operands: Sequence[int],
    end: tuple[int, int],
    with_more: Any,
    calls: Calls,
) -> tuple[list[Any], Any]:
    """Equations of the body that read nothing but some operands, and what is left.

    Args:
        eqn: a loop or a call; its body is the first of its jaxprs.
        operands: which may be read, each by the body as it is.
        end: where more may be inserted, among the body's inputs and the operands.
        with_more: of parameters and a number, those for so many more operands.
        calls: those in the program.
    """
    body = _compat.open_jaxpr(jaxprs_of(eqn)[0])
    inside, outside = end
    first = outside - inside  # A `while` has its condition's operands before.
    sources = {body.invars[i - first]: eqn.invars[i] for i in operands}
    views = views_in(body.eqns)
    values: dict[Any, Any] = {}  # Of a variable of the body, what stands for it.
    made, moved = [], []
    for old in body.eqns:
        if ops.mark_of(old) != "moments" and calls.quantization(old) is None:
            continue
        x, *codes = old.invars
        root, chain = chain_of(x, views) if isinstance(x, core.Var) else (x, [])
        if not _is_in(root, set(sources)) or not all(v in values for v in codes):
            continue
        program = body.replace(
            invars=[root, *codes],
            eqns=[*chain, old],
            outvars=old.outvars,
            constvars=(),
            effects=frozenset(),
        )
        inputs = [sources[root], *(values[v] for v in codes)]
        new, results = splice(program, inputs, moved_to(eqn))
        values.update(zip(old.outvars, results, strict=True))
        made += new
        moved.append(old)
    return made, _given(eqn, values, moved, end, with_more)


def _slices_before(
    scan: Any, weights: set[Any], stacks: Stacks, calls: Calls
) -> tuple[list[Any], Any]:
    """As `_before`, of slices of stacked weights."""
    body = _compat.open_jaxpr(scan.params["jaxpr"])
    start = sum(_compat.scan_counts(scan.params))
    pairs = zip(body.invars[start:], scan.invars[start:], strict=True)
    sources = {v: x for v, x in pairs if _is_in(x, weights)}
    if not sources or not scan.params["length"]:
        return [], scan
    views = views_in(body.eqns)
    values: dict[Any, Any] = {}
    made, moved = [], []
    for old in body.eqns:
        quantize, x = calls.quantization(old), (*old.invars, None)[0]
        if quantize is None or not isinstance(x, core.Var):
            continue
        root, chain = chain_of(x, views)
        if root not in sources:
            continue
        new, stack = stacks.views_of(sources[root], chain, scan)
        call = quantize.stacked(scan.params["length"])
        codes, results = calls(call, old, stack)
        values.update(zip(old.outvars, results, strict=True))
        made += [*new, *(code.replace(**moved_to(scan)(code)) for code in codes)]
        moved.append(old)
    end = len(body.invars), len(scan.invars)
    return made, _given(scan, values, moved, end, _compat.with_scan_slices)


def _given(
    eqn: Any,
    values: Mapping[Any, Any],
    moved: Sequence[Any],
    end: tuple[int, int],
    with_more: Any,
) -> Any:
    """An equation whose body reads `values` in the place of making them."""
    if not moved:
        return eqn
    subs = jaxprs_of(eqn)
    body = _compat.open_jaxpr(subs[0])
    gone = set(map(id, moved))
    stays = [old for old in body.eqns if id(old) not in gone]
    inside, outside = end
    invars = [*body.invars[:inside], *values, *body.invars[inside:]]
    operands = [*eqn.invars[:outside], *values.values(), *eqn.invars[outside:]]
    subs[0] = _compat.with_parts(subs[0], invars=invars, eqns=stays)
    params = with_more(eqn.params, len(values))
    return with_jaxprs(eqn.replace(params=params, invars=operands), subs)
