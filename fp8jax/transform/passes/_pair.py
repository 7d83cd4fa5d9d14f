"""Makes codes of one matrix once, and two ways in one call where both are needed."""

import collections
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.analysis import (
    OUTSIDE,
    Flags,
    Pass,
    Passes,
    Phase,
    add_results,
    flagged,
    inner_flags,
)
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    Views,
    construct_of,
    equations,
    memoized,
    name_of,
    read,
    reading,
    views_in,
    with_equations,
)
from fp8jax.transform.lower import Program, Quantize, QuantizeBoth


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
    """A quantization in a jaxpr: `way` of a value, where, and in which pass."""

    eqn: Any
    way: Quantize
    is_early: bool
    is_weight: bool
    in_backward: bool

    def goes_with(self, later: "_Made") -> bool:
        """Whether both are to be made in one call, where this one is.

        The codes of the later one are then kept from here on. A weight's are meant to
        be, and so are those that the recipe keeps; in square tiles both are the same.
        """
        one, other = self.way, later.way
        if one.operand == other.operand or one.other_tiles != other.other_tiles:
            return False
        same_codes = one.spec == other.spec.T
        # Across passes the later codes would be one more residual, of an activation.
        same_pass = self.in_backward == later.in_backward
        return same_pass or self.is_weight or later.is_early or same_codes


def pair(program: Program) -> Program:
    """Merges equal quantizations, and makes two ways of one matrix in one call."""
    calls, passes = program.calls, Passes()

    def visit(jaxpr: AnyJaxpr, flags: Flags, outer: Pass) -> AnyJaxpr:
        weights = flagged(jaxpr, flags)
        old = equations(jaxpr)
        views = views_in(old)
        found: dict[Hashable, list[_Made]] = collections.defaultdict(list)
        eqns = []
        for eqn in old:
            here = passes.at(outer, eqn)
            construct = construct_of(eqn)
            if construct is not None:
                flags_in = inner_flags(construct, weights)
                here_in = [here] * len(construct.bodies)
                eqn = construct.visited(visited, flags_in, here_in).equation()
            add_results(eqn, weights)
            way = calls.of(eqn)
            if isinstance(way, Quantize):
                made = _made(eqn, way, weights, here.phase)
                found[_value(made, views)].append(made)
            eqns.append(eqn)
        new: dict[int, list[JaxprEqn]] = {}  # By `id` of the equation, what it becomes.
        env: dict[Var, Atom] = {}
        for several in found.values():
            _together(several, calls, new, env)
        # In two steps: what reads codes may stand before the call that now makes them
        # was known.
        eqns = [made for eqn in eqns for made in new.get(id(eqn), [eqn])]
        eqns = [reading(eqn, env) for eqn in eqns]
        outvars = [read(x, env) for x in _compat.open_jaxpr(jaxpr).outvars]
        return with_equations(jaxpr, eqns, outvars)

    # Whatever the names around it, so that what is shared stays so.
    visited = memoized(visit, key=lambda flags, outer: (flags, outer.phase))
    return program.of(visited(program.jaxpr, program.is_weight, OUTSIDE))


def _made(eqn: JaxprEqn, way: Quantize, weights: set[Var], phase: Phase) -> _Made:
    return _Made(
        eqn,
        # When codes are made is no part of what they are: equal ones merge.
        dataclasses.replace(way, is_early=False),
        way.is_early,
        is_weight=all(v in weights for v in eqn.outvars),
        in_backward=phase in ("recompute", "backward"),
    )


def _value(made: _Made, views: Views) -> Hashable:
    """A key that quantizations of one matrix share."""
    way = made.way
    name = name_of(made.eqn.invars[0], views)
    # In another context, of compute-on or a mesh say, the same call is another one.
    return name, way.matrix, way.implementation, made.eqn.ctx


def _together(
    several: Sequence[_Made],
    calls: Calls,
    new: dict[int, list[JaxprEqn]],
    env: dict[Var, Atom],
) -> None:
    """Fills in what becomes of the quantizations of one matrix, and of their codes."""
    first_of: dict[Quantize, _Made] = {}
    for made in several:
        first = first_of.setdefault(made.way, made)
        if first is not made:
            env.update(zip(made.eqn.outvars, first.eqn.outvars, strict=True))
            new[id(made.eqn)] = []
    left = list(first_of.values())
    while left:
        one = left.pop(0)
        other = next((made for made in left if one.goes_with(made)), None)
        if other is None:
            continue
        left.remove(other)
        both = QuantizeBoth(one.way, other.way)
        eqns, _ = calls(both, one.eqn, one.eqn.invars[0])
        results = [*one.eqn.outvars, *other.eqn.outvars]
        new[id(one.eqn)] = [*eqns[:-1], eqns[-1].replace(outvars=results)]
        new[id(other.eqn)] = []
