"""Makes the equations that stand in for a `dot_general`.

In a function that holds its own backward pass, a product becomes quantizations and a
product of codes, so that products of the same value share its codes. In a forward
function it becomes one call of `ops.dot_general`, which brings its gradients along.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.quant import QuantSpec
from fp8jax.transform._calls import (
    Layer,
    Measure,
    Moments,
    Multiply,
    Product,
    Quantize,
    QuantizeBoth,
    Statistics,
    Turn,
)
from fp8jax.transform._interpreter import moved_to, splice
from fp8jax.transform._plan import (
    LayerDot,
    QuantizedDot,
    Replacement,
    specs_of,
)
from fp8jax.transform._rule_call import RuleCall
from fp8jax.transform._stored import StaticDot
from fp8jax.transform._stored_calls import static_equations

# Equal ones of one value are known to be equal: each layer may cast its input itself.
_VIEWS = ("convert_element_type", "reshape", "transpose")


_Pass = Literal["forward", "backward"]


class Replacer:
    """Replaces the products of one program.

    Called with a jaxpr it gives the function that replaces the `dot_general`s there: of
    an equation and what it is to become, it makes the equations standing in for it.
    They call `jax.jit` functions whose names start with `ops.MARK`; the last one has
    the old one's result, and all keep its name stack, source line and context.
    """

    def __init__(self, statistics: bool = False):
        """
        Args:
            statistics: whether each product comes with a call of `STATISTICS`.
        """
        self._statistics = statistics
        # Equal calls share one jaxpr, and so one function of the compiled program. Not
        # beyond one program: tracing depends on the mesh and on JAX's configuration.
        self._trace = functools.cache(_traced)

    def __call__(
        self, jaxpr: Any, planned: Mapping[int, Replacement | RuleCall]
    ) -> Callable[[Any, Replacement | RuleCall], list[Any]]:
        return _InJaxpr(jaxpr, planned, self._trace, self._statistics).replace


class _InJaxpr:
    """Replaces the products of one jaxpr, and remembers the codes made there."""

    def __init__(
        self,
        jaxpr: Any,
        planned: Mapping[int, Replacement | RuleCall],
        trace: Callable[..., Any],
        statistics: bool,
    ):
        self._trace = trace
        self._statistics = statistics
        eqns = _compat.open_jaxpr(jaxpr).eqns
        self._views = {
            eqn.outvars[0]: eqn
            for eqn in eqns
            if eqn.primitive.name in _VIEWS and len(eqn.invars) == 1
        }
        self._codes: dict[Hashable, list[Any]] = {}
        # How each value is to be quantized, and in which passes.
        self._wanted: dict[Hashable, dict[Quantize, set[_Pass]]]
        self._wanted = collections.defaultdict(lambda: collections.defaultdict(set))
        for index, what in planned.items():
            if isinstance(what, QuantizedDot) and not what.split:
                self._note_wanted(eqns[index], what)

    def _note_wanted(self, eqn: Any, what: QuantizedDot) -> None:
        layout, (lhs, rhs) = _layout(eqn), eqn.invars
        for side, x, operand, spec in (
            ("lhs", lhs, layout.lhs, what.lhs_spec),
            ("rhs", rhs, layout.rhs, what.rhs_spec),
        ):
            quantize = _quantization(operand, spec, what.implementation)
            passes = self._wanted[self._value(x, quantize, eqn)][quantize]
            passes.add(_pass_of(what))
            if what.early and side == what.first:
                passes.add("forward")

    def replace(self, eqn: Any, what: Replacement | RuleCall) -> list[Any]:
        if isinstance(what, RuleCall):
            eqns, results = self._calls(what, eqn, *eqn.invars)
            assert eqns[-1].outvars == results, "one call gives all results"
            return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]
        if isinstance(what, StaticDot):
            return static_equations(eqn, what, self._calls, self._codes)
        if isinstance(what, QuantizedDot) and not what.split:
            eqns = self._shared(eqn, what)
        else:
            eqns = self._alone(eqn, what)
        (result,), out = eqns[-1].outvars, eqn.outvars[0].aval
        same = (result.aval.shape, result.aval.dtype) == (out.shape, out.dtype)
        same &= _compat.varying_axes(result.aval) == _compat.varying_axes(out)
        same &= not _compat.is_explicit(out) or result.aval.sharding == out.sharding
        assert same, f"{result.aval} cannot stand in for {out}"
        return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]

    def _alone(self, eqn: Any, what: Replacement) -> list[Any]:
        """Equations of a product that is one call."""
        dimension_numbers = eqn.params["dimension_numbers"]
        if isinstance(what, LayerDot):
            options = eqn.params["precision"], eqn.params["preferred_element_type"]
            call = Layer(what, dimension_numbers, *options)
        else:
            dtype = np.dtype(eqn.outvars[0].aval.dtype)
            call = Product(what, dimension_numbers, dtype)
        product, _ = self._calls(call, eqn, *eqn.invars)
        specs = specs_of(what)
        if not self._statistics or not specs:
            return product
        layout = _layout(eqn)
        quantize = (
            _quantization(layout.lhs, specs[0], what.implementation),
            _quantization(layout.rhs, specs[1], what.implementation),
        )
        measure = Measure(quantize, what.first)
        spec = jax.sharding.PartitionSpec()
        measured, _ = self._calls(measure, eqn, *eqn.invars, out_spec=spec)
        return [*measured, *product]

    def _shared(self, eqn: Any, what: QuantizedDot) -> list[Any]:
        """Equations of a product of codes that other products use, too."""
        layout, (lhs, rhs) = _layout(eqn), eqn.invars
        of_lhs = self._quantized(lhs, layout.lhs, what.lhs_spec, what, eqn)
        of_rhs = self._quantized(rhs, layout.rhs, what.rhs_spec, what, eqn)
        eqns = [*of_lhs[0], *of_rhs[0]]
        if self._statistics:
            from_lhs = self._measured(lhs, layout.lhs, what.lhs_spec, what, eqn)
            from_rhs = self._measured(rhs, layout.rhs, what.rhs_spec, what, eqn)
            together = Statistics(what.first)
            pair, _ = self._calls(together, eqn, *from_lhs[1], *from_rhs[1])
            eqns += [*from_lhs[0], *from_rhs[0], *pair]
        multiply = Multiply(
            what.role,
            layout,
            (what.lhs_spec.tile, what.rhs_spec.tile),
            np.dtype(eqn.outvars[0].aval.dtype),
            what.implementation,
        )
        return eqns + self._calls(multiply, eqn, *of_lhs[1], *of_rhs[1])[0]

    def _quantized(
        self,
        x: Any,
        operand: ops.Operand,
        spec: QuantSpec,
        what: QuantizedDot,
        place: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Equations for an operand's codes and scales, `[free, contraction]`, and both.

        Codes are kept as stored: a weight's in square tiles serve fprop and dgrad.
        """
        quantize = _quantization(operand, spec, what.implementation)
        value = self._value(x, quantize, place)
        key = (value, quantize)
        eqns = []
        if key not in self._codes:
            now = [quantize] + [
                other
                for other, passes in self._wanted[value].items()
                if other.spec == quantize.spec.T != quantize.spec
                and (value, other) not in self._codes
                and _pass_of(what) in passes
            ]
            is_early = "forward" in self._wanted[value][quantize] - {_pass_of(what)}
            call = dataclasses.replace(quantize, is_early=is_early)
            if len(now) > 1:
                call = QuantizeBoth((quantize, now[1]))
            eqns, codes = self._calls(call, place, x)
            for i, made in enumerate(now[:2]):
                self._codes[value, made] = codes[2 * i : 2 * i + 2]
        turn = Turn(operand, quantize.spec.tile)
        if (key, turn) not in self._codes:
            turned, self._codes[key, turn] = self._calls(turn, place, *self._codes[key])
            eqns += turned
        return eqns, self._codes[key, turn]

    def _measured(
        self,
        x: Any,
        operand: ops.Operand,
        spec: QuantSpec,
        what: QuantizedDot,
        place: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Equations for the moments of an operand that is quantized, and them."""
        quantize = _quantization(operand, spec, what.implementation)
        codes = (self._value(x, quantize, place), quantize)
        eqns = []
        if (codes, Moments) not in self._codes:
            made = self._calls(Moments(quantize), place, x, *self._codes[codes])
            eqns, self._codes[codes, Moments] = made
        return eqns, self._codes[codes, Moments]

    def _value(self, x: Any, quantize: Quantize, place: Any) -> Hashable:
        """The same for operands that are the same matrix."""
        return self._name(x), quantize.operand, quantize.implementation, place.ctx

    def _name(self, x: Any) -> Hashable:
        """The same for equal views of the same variable."""
        if isinstance(x, core.Literal):
            return id(x)
        view = self._views.get(x)
        if view is None:
            return x
        params = tuple(sorted(view.params.items()))
        return view.primitive.name, params, self._name(view.invars[0])

    def _calls(
        self,
        function: Callable[..., Any],
        place: Any,
        *inputs: Any,
        out_spec: jax.sharding.PartitionSpec | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """The equations of `function(*inputs)` in the place of another, and results.

        Where types are explicit, the result's sharding is the other's or `out_spec`.
        """
        out_sharding, replaced = None, place.outvars[0].aval
        if _compat.is_explicit(replaced):
            mesh, spec = replaced.sharding.mesh, replaced.sharding.spec
            spec = spec if out_spec is None else out_spec
            out_sharding = jax.sharding.NamedSharding(mesh, spec)
        context = _compat.TracingContext.of(place)
        avals = [x.aval for x in inputs]
        traced = self._trace(function, context, out_sharding, *avals)
        return splice(traced, inputs, moved_to(place))


def _pass_of(what: QuantizedDot) -> _Pass:
    return "forward" if what.role == "fprop" else "backward"


def _layout(eqn: Any) -> ops.Layout:
    lhs, rhs = (x.aval.shape for x in eqn.invars)
    return ops.plan(lhs, rhs, eqn.params["dimension_numbers"], "fp8_transform")


def _quantization(
    operand: ops.Operand, spec: QuantSpec, implementation: str | None
) -> Quantize:
    """Of an operand as it is stored: turned around, it serves another product."""
    as_stored = dataclasses.replace(operand, contraction=1)
    return Quantize(as_stored, operand.stored(spec), implementation)


def _traced(
    function: Callable[..., Any], context: Any, out_sharding: Any, *avals: Any
) -> Any:
    if out_sharding is not None:  # Only the result's type is explicit within.
        function = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    with context.entered():
        jaxpr = _compat.open_jaxpr(jax.make_jaxpr(function)(*avals))
    assert not jaxpr.constvars, "a replacement closes over no array"
    return jaxpr
