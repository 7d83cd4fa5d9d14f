"""Replaces equations at given positions in nested jaxprs.

An equation becomes equations that give the same results. No type changes, so shardings,
donation, scan carries, branches and remat policies stay valid, and no primitive's
parameters need parsing.
"""

import collections
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir._jaxprs import jaxprs_of, with_jaxprs
from fp8jax.transform.ir._types import AnyJaxpr

# Of an equation and what is said of it, the equations that take its place.
Replacer: TypeAlias = Callable[[JaxprEqn, Any], list[JaxprEqn]]
Position = tuple[int, ...]  # equation, sub-jaxpr, equation, ..., equation


def rewrite_at(
    jaxpr: AnyJaxpr,
    plan: Mapping[Position, Hashable],
    replacer: Callable[[AnyJaxpr, Mapping[int, Any]], Replacer],
) -> AnyJaxpr:
    """Replaces equations of `jaxpr` and of the jaxprs in it.

    Args:
        jaxpr: with or without constants.
        plan: what is to become of the equation at each position.
        replacer: for a jaxpr and `plan`'s words on its own equations, by number, the
            function that makes new equations of one and the word on that. They may
            read what was there before, and what the function's earlier equations gave;
            among their results are the old one's.

    Returns:
        A jaxpr of the same inputs and outputs; `jaxpr` itself for an empty plan.
    """
    # One jaxpr may be called from many places: where the plan agrees, so must the
    # result, or XLA compiles every layer by itself.
    done: dict[Hashable, Any] = {}

    def visit(jaxpr: AnyJaxpr, plan: tuple[tuple[Position, Hashable], ...]) -> AnyJaxpr:
        if not plan:
            return jaxpr
        key = (id(jaxpr), plan)
        if key not in done:
            by_eqn = collections.defaultdict(list)
            for position, what in plan:
                by_eqn[position[0]].append((position[1:], what))
            own = {i: e[0][1] for i, e in by_eqn.items() if not e[0][0]}
            replace = replacer(jaxpr, own)
            eqns = []
            for i, eqn in enumerate(_compat.open_jaxpr(jaxpr).eqns):
                eqns += visit_eqn(eqn, by_eqn[i], replace) if i in by_eqn else [eqn]
            done[key] = _compat.with_parts(jaxpr, eqns=eqns)
        return done[key]

    def visit_eqn(
        eqn: JaxprEqn,
        entries: list[tuple[Position, Hashable]],
        replace: Replacer,
    ) -> list[JaxprEqn]:
        if not entries[0][0]:
            new = replace(eqn, entries[0][1])
            made = {v for e in new for v in e.outvars}
            assert made.issuperset(eqn.outvars), "results stay"
            return new
        by_sub = collections.defaultdict(list)
        for position, what in entries:
            by_sub[position[0]].append((position[1:], what))
        subs = enumerate(jaxprs_of(eqn))
        return [with_jaxprs(eqn, [visit(s, tuple(by_sub[i])) for i, s in subs])]

    return visit(jaxpr, tuple(sorted(plan.items(), key=lambda item: item[0])))
