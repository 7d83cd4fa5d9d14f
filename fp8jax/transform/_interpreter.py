"""Walks a jaxpr, and rewrites one; knows no primitive.

Rewriting replaces an equation by equations that give the same results, in nested
jaxprs too. No type changes, so shardings, donation, scan carries, branches and remat
policies stay valid, and no primitive's parameters need parsing.
"""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform._lineage import begun, outside
from fp8jax.transform._liveness import Read, reads
from fp8jax.transform._phase_flow import PhasesByFlow
from fp8jax.transform._phases import Passes, Phase
from fp8jax.transform._readers import Readers
from fp8jax.transform._values import Dot, HandWritten, Position, Scope, Value
from fp8jax.transform.ir import jaxprs_of, primitive_of, with_jaxprs

# Gives an equation's results from its operands, and tells `Flow` of the dots in it.
FlowRule = Callable[["Flow", Any, Sequence[Value], Scope], Sequence[Value]]


def rewrite(
    jaxpr: Any,
    plan: Mapping[Position, Hashable],
    replacer: Callable[[Any, Mapping[int, Any]], Callable[[Any, Any], list[Any]]],
) -> Any:
    """`jaxpr` with some equations replaced.

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

    def visit(jaxpr: Any, plan: tuple[tuple[Position, Hashable], ...]) -> Any:
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
        eqn: Any,
        entries: list[tuple[Position, Hashable]],
        replace: Callable[[Any, Any], list[Any]],
    ) -> list[Any]:
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


class Flow:
    """One walk over a jaxpr: what each product's operands depend on.

    Attributes:
        closure: `Value.leaves` of arrays that are no arguments.
        dots: every product found, by position.
        hand_written: every call with a gradient rule of its own found, by position.
        readers: what reads products' results.
        phases: tells passes by what equations read.
        updated: `Value.leaves` of what optimizers, say, put gradients into.
        returned: `Value.leaves` of arguments of which a result may be the gradient.
        chosen: by the number of a value that a `cond` chose, the number of its index
            and the value of each branch.
    """

    def __init__(
        self,
        rules: Mapping[str, FlowRule],
        default: FlowRule,
        closure: int,
        trusts_names: bool = False,
    ):
        """
        Args:
            rules: by the name of the primitive.
            default: for all others.
            closure: `Value.leaves` of arrays that are no arguments.
            trusts_names: as in `PhasesByFlow`.
        """
        self._rules = rules
        self._default = default
        self.closure = closure
        self._numbers: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._passes = Passes()
        self.phases = PhasesByFlow(trusts_names)
        self.dots: dict[Position, Dot] = {}
        self.hand_written: dict[Position, HandWritten] = {}
        self.readers = Readers()
        self.updated = self.returned = 0
        self.chosen: dict[int, tuple[int, tuple[Value, ...]]] = {}

    def number(self, *key: Hashable) -> int:
        """One integer for each distinct key."""
        if key not in self._numbers:
            self._numbers[key] = len(self._keys)
            self._keys.append(key)
        return self._numbers[key]

    def key(self, number: int) -> Any:
        """What was numbered."""
        return self._keys[number]

    def input(self, leaf: int) -> Value:
        """The value of an argument's leaf."""
        number = self.number("leaf", leaf)
        return Value(1 << leaf, number, number, versions=1 << leaf)

    def constant(self, x: Any) -> Value:
        """The value of something that is no argument: a literal or a closed-over array.

        Scalars depend on nothing, so that a rescaled weight stays a weight.
        """
        if np.ndim(x) == 0 and not isinstance(x, core.Var):
            number = self.number("literal", str(x), str(getattr(x, "dtype", type(x))))
            return Value(0, number, number)
        number = self.number("constant", id(x))
        return Value(self.closure, number, number, versions=self.closure)

    def run(self, jaxpr: Any) -> None:
        """Walks a whole program."""
        inner = _compat.open_jaxpr(jaxpr)
        inputs = [self.input(i) for i, _ in enumerate(inner.invars)]
        results = self.walk(jaxpr, inputs, Scope())
        gradients = {
            _type_of(v)
            for v, x in zip(inner.outvars, results, strict=True)
            if x.cotangent
        }
        for i, v in enumerate(inner.invars):
            self.returned |= (_type_of(v) in gradients) << i

    def walk(
        self,
        jaxpr: Any,
        inputs: Sequence[Value],
        scope: Scope,
        read: Read | None = None,
    ) -> list[Value]:
        """The results of a jaxpr.

        Args:
            jaxpr: with or without constants.
            inputs: one value for each of its `invars`.
            scope: of the jaxpr.
            read: which of its results are read; all by default.
        """
        inner = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Value] = {}

        def value_of(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return self.constant(atom.val)
            return env[atom]

        consts = _compat.jaxpr_consts(jaxpr) or inner.constvars
        env.update(zip(inner.constvars, map(self.constant, consts), strict=True))
        env.update(zip(inner.invars, inputs, strict=True))
        for i, (eqn, is_read) in enumerate(
            zip(inner.eqns, reads(inner, read), strict=True)
        ):
            rule = self._rules.get(primitive_of(eqn), self._default)
            here = scope.at(i, eqn, self._passes, is_read)
            if here.phase == "forward":
                for v in eqn.invars:
                    if isinstance(v, core.Var) and env[v].ended:
                        env[v] = begun(env[v])
            operands = [value_of(v) for v in eqn.invars]
            here = here.in_phase(self._phase_of(here.phase, eqn, operands))
            results = rule(self, eqn, operands, here)
            if here.phase == "outside":
                results = [*map(outside, results)]
            env.update(zip(eqn.outvars, results, strict=True))
        return [value_of(v) for v in inner.outvars]

    def _phase_of(self, phase: Phase, eqn: Any, operands: Sequence[Value]) -> Phase:
        # What dequantizes a weight in a backward body reads no cotangent, and is not
        # where the backward pass begins.
        is_ours = phase == "backward" and ops.mark_of(eqn) is not None
        if is_ours and not any(x.cotangent for x in operands):
            return "recompute"
        return self.phases.of(phase, operands)


def _type_of(v: Any) -> tuple[Any, Any]:
    return getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)
