"""Walks a jaxpr, and follows what its values are made of; knows no primitive."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from fp8jax import _compat
from fp8jax.transform.analysis._liveness import Read, reads
from fp8jax.transform.analysis._phase_flow import PhasesByFlow
from fp8jax.transform.analysis._phases import Passes
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
        return Value(1 << leaf, number, number)

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
        return Value(self.closure, number, number)

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
            operands = [value_of(v) for v in eqn.invars]
            here = scope.at(i, eqn, self._passes, is_read)
            # After names, values: what a backward pass computes again has its names.
            here = here.in_phase(self.phases.of(here.phase, operands))
            env.update(zip(eqn.outvars, rule(self, eqn, operands, here), strict=True))
        return [value_of(v) for v in inner.outvars]
