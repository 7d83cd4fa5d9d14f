"""Makes the equations that stand in for a `dot_general`.

In a function that holds its own backward pass, a product becomes quantizations and a
product of codes, so that products of the same value share its codes. In a forward
function it becomes one call of `ops.dot_general`, which brings its gradients along.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from fp8jax import _compat, ops
from fp8jax.quant import QuantSpec
from fp8jax.transform.analysis import SIDES, Side, read_transposed
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    Replacer,
    aval_of,
    dimension_numbers,
    is_product,
    name_of,
    product_options,
    rewrite_at,
    views_in,
)
from fp8jax.transform.lower import (
    Collect,
    Layer,
    Measure,
    Moments,
    Multiply,
    Product,
    Program,
    Quantize,
    Statistics,
    ragged_call,
    stored_equations,
)
from fp8jax.transform.plan import (
    Decision,
    LayerDot,
    QuantizedDot,
    RuleCall,
    StoredDot,
    specs_of,
)

_Planned: TypeAlias = Mapping[int, Decision | RuleCall]


def replace(program: Program) -> Program:
    """Replaces planned equations by operations of `lower`, or by a rewritten rule.

    Of those that stand in for one, one has its results, and all keep its name stack,
    source line and context. Where `program.measures`, each product in FP8 comes with a
    call whose result is collected.
    """

    def replacer(jaxpr: AnyJaxpr, planned: _Planned) -> Replacer:
        return _InJaxpr(jaxpr, planned, program.calls, program.measures).replace

    return program.of(rewrite_at(program.jaxpr, program.replacements, replacer))


class _InJaxpr:
    """Replaces the products of one jaxpr, and remembers the codes made there."""

    def __init__(
        self,
        jaxpr: AnyJaxpr,
        planned: _Planned,
        calls: Calls,
        statistics: bool,
    ):
        self._calls = calls
        self._statistics = statistics
        eqns = _compat.open_jaxpr(jaxpr).eqns
        self._views = views_in(eqns)
        self._exchanged = {
            eqns[i].outvars[0]
            for i in read_transposed(_compat.open_jaxpr(jaxpr), planned)
        }
        # Of one jaxpr: a body's codes are no variables of the next one's.
        self._codes: dict[Hashable, list[Any]] = {}
        # What is needed before the backward pass, by the recipe or by a product.
        self._early: set[Hashable] = set()
        for index, what in planned.items():
            if isinstance(what, QuantizedDot) and what.early and not what.alone:
                eqn = eqns[index]
                x, quantize = _operand(eqn, what, what.first)
                self._early.add(self._key(x, quantize, eqn))

    def replace(self, eqn: JaxprEqn, what: Decision | RuleCall) -> list[JaxprEqn]:
        if isinstance(what, RuleCall):
            return self._ruled(eqn, what)
        if isinstance(what, StoredDot):
            return stored_equations(eqn, what, self._calls, self._codes)
        if not is_product(eqn):
            # Rows in groups are quantized within the call: groups share no codes yet.
            eqns, _ = self._calls(ragged_call(eqn, what), eqn, *eqn.invars)
        elif isinstance(what, QuantizedDot) and not what.alone:
            eqns = self._shared(eqn, what)
        else:
            eqns = self._alone(eqn, what)
        (result,), out = eqns[-1].outvars, aval_of(eqn.outvars[0])
        # What reads the result was traced for this type: JAX checks none of it again.
        same = (aval_of(result).shape, aval_of(result).dtype) == (out.shape, out.dtype)
        same &= _compat.varying_axes(aval_of(result)) == _compat.varying_axes(out)
        same &= not _compat.is_explicit(out) or aval_of(result).sharding == out.sharding
        assert same, f"{aval_of(result)} cannot stand in for {out}"
        return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]

    def _ruled(self, eqn: JaxprEqn, what: RuleCall) -> list[JaxprEqn]:
        """Equations of a function with a gradient rule, and of what it measures."""
        eqns, results = self._calls(what, eqn, *eqn.invars)
        assert eqns[-1].outvars == results, "one call gives all results"
        # Moments come after a rule's own results: they have no cotangents.
        own = len(eqn.outvars)
        eqns[-1] = eqns[-1].replace(outvars=[*eqn.outvars, *results[own:]])
        for moments in results[own:]:
            eqns += self._calls(Collect(), eqn, moments)[0]
        return eqns

    def _alone(self, eqn: JaxprEqn, what: QuantizedDot | LayerDot) -> list[JaxprEqn]:
        """Equations of a product that is one call."""
        if isinstance(what, LayerDot):
            call = Layer(what, dimension_numbers(eqn), *product_options(eqn))
        else:
            dtype = np.dtype(aval_of(eqn.outvars[0]).dtype)
            exchanged = eqn.outvars[0] in self._exchanged
            call = Product(what, _layout(eqn), dtype, exchanged)
        product, _ = self._calls(call, eqn, *eqn.invars)
        return [*self._measured_alone(eqn, what), *product]

    def _measured_alone(
        self, eqn: JaxprEqn, what: QuantizedDot | LayerDot
    ) -> list[JaxprEqn]:
        """Equations that quantize a product's operands to measure them."""
        specs = specs_of(what)
        if not self._statistics or not specs:
            return []
        # By a kernel that XLA can split: outside of the product there is no rule.
        measured_by = "xla" if what.split else what.implementation
        quantize = _quantizations(eqn, specs, measured_by)
        measure = Measure(quantize, what.first)
        spec = jax.sharding.PartitionSpec()
        return self._calls(measure, eqn, *eqn.invars, out_spec=spec)[0]

    def _shared(self, eqn: JaxprEqn, what: QuantizedDot) -> list[JaxprEqn]:
        """Equations of a product of codes that other products use, too."""
        codes = [self._quantized(side, what, eqn) for side in SIDES]
        eqns = [made for new, _ in codes for made in new]
        if what.split:
            eqns += self._measured_alone(eqn, what)
        elif self._statistics:
            measured = [self._measured(side, what, eqn) for side in SIDES]
            eqns += [made for new, _ in measured for made in new]
            moments = [x for _, found in measured for x in found]
            eqns += self._calls(Statistics(what.first), eqn, *moments)[0]
        multiply = Multiply(
            what.role,
            _layout(eqn),
            (what.lhs_spec.tile, what.rhs_spec.tile),
            np.dtype(aval_of(eqn.outvars[0]).dtype),
            what.implementation,
            exchanged=eqn.outvars[0] in self._exchanged,
            split=what.split,
        )
        operands = [x for _, made in codes for x in made]
        return eqns + self._calls(multiply, eqn, *operands)[0]

    def _quantized(
        self, side: Side, what: QuantizedDot, place: JaxprEqn
    ) -> tuple[list[JaxprEqn], list[Any]]:
        """Quantizes an operand: equations, and the variables of codes and scales."""
        x, quantize = _operand(place, what, side)
        key = self._key(x, quantize, place)
        if key in self._codes:
            return [], self._codes[key]
        # Fprop's own codes are made in the forward pass anyway.
        is_early = key in self._early and what.role != "fprop"
        call = dataclasses.replace(quantize, is_early=is_early)
        eqns, self._codes[key] = self._calls(call, place, x)
        return eqns, self._codes[key]

    def _measured(
        self, side: Side, what: QuantizedDot, place: JaxprEqn
    ) -> tuple[list[JaxprEqn], list[Any]]:
        """Measures a quantized operand: equations, and the variable of its moments."""
        x, quantize = _operand(place, what, side)
        key = self._key(x, quantize, place)
        eqns = []
        if (key, Moments) not in self._codes:
            made = self._calls(Moments(quantize), place, x, *self._codes[key])
            eqns, self._codes[key, Moments] = made
        return eqns, self._codes[key, Moments]

    def _key(self, x: Atom, quantize: Quantize, place: JaxprEqn) -> Hashable:
        """A key that operands of the same codes share."""
        # By views, not by variable: each layer may cast or reshape its input itself.
        return name_of(x, self._views), quantize, place.ctx


def _operand(eqn: JaxprEqn, what: QuantizedDot, side: Side) -> tuple[Any, Quantize]:
    """One operand of a product, and how it is quantized."""
    specs = what.lhs_spec, what.rhs_spec
    lhs, rhs = _quantizations(eqn, specs, what.implementation, what.split)
    x, y = eqn.invars
    return (x, lhs) if side == "lhs" else (y, rhs)


def _quantizations(
    eqn: JaxprEqn,
    specs: tuple[QuantSpec, ...],
    implementation: str | None,
    split: bool = False,
) -> tuple[Quantize, Quantize]:
    layout, (lhs_spec, rhs_spec) = _layout(eqn), specs
    return (
        Quantize(layout.lhs, lhs_spec, implementation, split=split),
        Quantize(layout.rhs, rhs_spec, implementation, split=split),
    )


def _layout(eqn: JaxprEqn) -> ops.Layout:
    lhs, rhs = (aval_of(x).shape for x in eqn.invars)
    return ops.plan(lhs, rhs, dimension_numbers(eqn), "fp8_transform")
