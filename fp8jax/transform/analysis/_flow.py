"""Walks a jaxpr, and follows what its values are made of; knows no primitive."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.transform.analysis._lineage import begun, outside
from fp8jax.transform.analysis._liveness import Read, reads
from fp8jax.transform.analysis._phase_flow import PhasesByFlow
from fp8jax.transform.analysis._phases import Passes, Phase
from fp8jax.transform.analysis._readers import Readers
from fp8jax.transform.analysis._values import Dot, HandWritten, Scope, Value
from fp8jax.transform.ir import AnyJaxpr, Atom, Position, primitive_of

# Gives an equation's results from its operands, and tells `Flow` of the dots in it.
FlowRule = Callable[["Flow", Any, Sequence[Value], Scope], Sequence[Value]]


class Flow:
    """Follows values through a jaxpr, to tell what each product's operands are made of.

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
        """The value of a literal or of a closed-over array.

        Scalars depend on nothing, so that a rescaled weight stays a weight.
        """
        # Equal literals are one value wherever they stand. An array may be large, and
        # is told by the object.
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
        jaxpr: AnyJaxpr,
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

        def value_of(atom: Atom) -> Value:
            if isinstance(atom, core.Literal):
                return self.constant(atom.val)
            return env[atom]

        # An open jaxpr names its constants without having them: then by the variable.
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
            # After names, values: what a backward pass computes again has its names.
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
