"""Makes the equations that stand in for a `dot_general`.

In a function that holds its own backward pass, a product becomes quantizations and a
product of codes, so that products of the same value share its codes. In a forward
function it becomes one call of `ops.dot_general`, which brings its gradients along.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from fp8jax import _compat, ops
from fp8jax.quant import QTensor, QuantSpec
from fp8jax.transform._plan import LayerDot, QuantizedDot, Replacement
from fp8jax.transform._roles import Role

# Equal ones of one value are known to be equal: each layer may cast its input itself.
_VIEWS = ("convert_element_type", "reshape", "transpose")


class Replacer:
    """Replaces the products of one program.

    Called with a jaxpr it gives the function that replaces the `dot_general`s there: of
    an equation and what it is to become, it makes the equations standing in for it.
    They call `jax.jit` functions whose names start with `ops.MARK`; the last one has
    the old one's result, and all keep its name stack, source line and context.
    """

    def __init__(self):
        # Equal calls share one jaxpr, and so one function of the compiled program. Not
        # beyond one program: tracing depends on the mesh and on JAX's configuration.
        self._trace = functools.cache(_traced)

    def __call__(self, jaxpr: Any) -> Callable[[Any, Replacement], list[Any]]:
        return _InJaxpr(jaxpr, self._trace).replace


class _InJaxpr:
    """Replaces the products of one jaxpr, and remembers the codes made there."""

    def __init__(self, jaxpr: Any, trace: Callable[..., Any]):
        self._trace = trace
        self._views = {
            eqn.outvars[0]: eqn
            for eqn in _compat.open_jaxpr(jaxpr).eqns
            if eqn.primitive.name in _VIEWS and len(eqn.invars) == 1
        }
        self._codes: dict[Hashable, list[Any]] = {}

    def replace(self, eqn: Any, what: Replacement) -> list[Any]:
        dimension_numbers = eqn.params["dimension_numbers"]
        (lhs, rhs), out = eqn.invars, eqn.outvars[0].aval
        if isinstance(what, LayerDot):
            options = eqn.params["precision"], eqn.params["preferred_element_type"]
            layer = _Layer(what, dimension_numbers, *options)
            eqns, _ = self._calls(layer, eqn, lhs, rhs)
        elif what.split:
            whole = _Product(what, dimension_numbers, np.dtype(out.dtype))
            eqns, _ = self._calls(whole, eqn, lhs, rhs)
        else:
            shapes = lhs.aval.shape, rhs.aval.shape
            layout = ops.plan(*shapes, dimension_numbers, "fp8_transform")
            of_lhs = self._quantized(lhs, layout.lhs, what.lhs_spec, what, eqn)
            of_rhs = self._quantized(rhs, layout.rhs, what.rhs_spec, what, eqn)
            multiply = _Multiply(
                what.role,
                layout,
                (what.lhs_spec.tile, what.rhs_spec.tile),
                np.dtype(out.dtype),
                what.implementation,
            )
            product, _ = self._calls(multiply, eqn, *of_lhs[1], *of_rhs[1])
            eqns = [*of_lhs[0], *of_rhs[0], *product]
        (result,) = eqns[-1].outvars
        same = (result.aval.shape, result.aval.dtype) == (out.shape, out.dtype)
        same &= _compat.varying_axes(result.aval) == _compat.varying_axes(out)
        same &= not _compat.is_explicit(out) or result.aval.sharding == out.sharding
        assert same, f"{result.aval} cannot stand in for {out}"
        return [*eqns[:-1], eqns[-1].replace(outvars=eqn.outvars)]

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
        as_stored = dataclasses.replace(operand, contraction=1)
        quantize = _Quantize(as_stored, operand.stored(spec), what.implementation)
        key = (self._name(x), quantize, place.ctx)
        eqns = []
        if key not in self._codes:
            eqns, self._codes[key] = self._calls(quantize, place, x)
        turn = _Turn(operand, quantize.spec.tile)
        if (key, turn) not in self._codes:
            turned, self._codes[key, turn] = self._calls(turn, place, *self._codes[key])
            eqns += turned
        return eqns, self._codes[key, turn]

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
        self, function: Callable[..., Any], place: Any, *inputs: Any
    ) -> tuple[list[Any], list[Any]]:
        """The equations of `function(*inputs)` in the place of another, and results."""
        explicit = _compat.is_explicit(place.outvars[0].aval)
        out_sharding = place.outvars[0].aval.sharding if explicit else None
        context = _compat.TracingContext.of(place)
        avals = [x.aval for x in inputs]
        traced = self._trace(function, context, out_sharding, *avals)
        env = dict(zip(traced.invars, inputs, strict=True))
        eqns = []
        for eqn in traced.eqns:
            outvars = [core.Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
            eqns.append(
                eqn.replace(
                    invars=[env[x] for x in eqn.invars],
                    outvars=outvars,
                    source_info=place.source_info,
                    ctx=place.ctx,
                )
            )
        return eqns, [env[x] for x in traced.outvars]


def _traced(
    function: Callable[..., Any], context: Any, out_sharding: Any, *avals: Any
) -> Any:
    if out_sharding is not None:  # Only the result's type is explicit within.
        function = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    with context.entered():
        jaxpr = _compat.open_jaxpr(jax.make_jaxpr(function)(*avals))
    assert not jaxpr.constvars, "a replacement closes over no array"
    return jaxpr


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arrays: jax.Array) -> Any:
        return function(*arrays)

    run.__name__ = run.__qualname__ = f"{ops.MARK}{name}"
    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class _Quantize:
    """A marked call that quantizes an operand, as `spec` says of its stored order."""

    operand: ops.Operand
    spec: QuantSpec
    implementation: str | None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _marked("quantize", self._run)(x)

    def _run(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = ops.quantize_operand(x, self.operand, self.spec, self.implementation)
        return q.data, q.scale


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Codes and scales as stored, brought to `[free, contraction]`: no marked call."""

    operand: ops.Operand
    tile: tuple[int, int]

    def __call__(
        self, data: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        q = ops.in_contraction_order(QTensor(data, scale, self.tile), self.operand)
        return q.data, q.scale


@dataclasses.dataclass(frozen=True)
class _Multiply:
    """A marked call that multiplies codes: `(lhs, its scale, rhs, its scale)`."""

    role: Role
    layout: ops.Layout
    tiles: tuple[tuple[int, int], tuple[int, int]]
    out_dtype: np.dtype
    implementation: str | None

    def __call__(self, *codes: jax.Array) -> jax.Array:
        return _marked(self.role, self._run)(*codes)

    def _run(self, *codes: jax.Array) -> jax.Array:
        lhs, lhs_scale, rhs, rhs_scale = codes
        lhs_tile, rhs_tile = self.tiles
        return ops.multiply_operands(
            QTensor(lhs, lhs_scale, lhs_tile),
            QTensor(rhs, rhs_scale, rhs_tile),
            self.layout,
            self.out_dtype,
            self.implementation,
        )


@dataclasses.dataclass(frozen=True)
class _Product:
    """A marked call that quantizes and multiplies, for XLA to split over devices."""

    what: QuantizedDot
    dimension_numbers: Any
    out_dtype: np.dtype

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _marked(self.what.role, self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return ops.quantized_dot(
            lhs,
            rhs,
            self.dimension_numbers,
            self.what.lhs_spec,
            self.what.rhs_spec,
            preferred_element_type=self.out_dtype,
            implementation=self.what.implementation,
            split=True,
        )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A marked call of `ops.dot_general`."""

    what: LayerDot
    dimension_numbers: Any
    precision: Any
    preferred_element_type: Any

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _marked("dot_general", self._run)(lhs, rhs)

    def _run(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        (lhs_dims, rhs_dims), _ = self.dimension_numbers
        dot = functools.partial(
            ops.dot_general,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            recipe=self.what.recipe,
            implementation=self.what.implementation,
        )
        if self.what.weight == "rhs":
            return dot(lhs, rhs, ((lhs_dims, rhs_dims), ((), ())))
        # `ops.dot_general` takes the weight second, and gives its dimensions last.
        out = dot(rhs, lhs, ((rhs_dims, lhs_dims), ((), ())))
        n_first = rhs.ndim - len(rhs_dims)
        order = (*range(n_first, out.ndim), *range(n_first))
        return jax.lax.transpose(out, order)
