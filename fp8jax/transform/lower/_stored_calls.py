"""The equations of products of weights that came as QTensors."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from fp8jax import ops
from fp8jax.ops import marked
from fp8jax.quant import QTensor, QuantSpec, quantize
from fp8jax.recipes import Recipe
from fp8jax.transform.ir import aval_of, dimension_numbers
from fp8jax.transform.plan import StoredDot


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A marked call that quantizes an activation as `[free, contraction]`."""

    operand: ops.Operand
    spec: QuantSpec
    implementation: str | None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return marked("quantize", self._run)(x)

    def _run(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.operand.arrange(x)
        x = x if self.operand.contraction == 1 else x.mT
        run = functools.partial(
            quantize, spec=self.spec, implementation=self.implementation
        )
        q = ops.without_derivative("fp8_transform", run)(x)
        return q.data, q.scale


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A marked call of an activation and a weight's codes and scales.

    For XLA to split over devices: an activation quantized by itself would be gathered.
    """

    operand: ops.Operand
    multiply: "_Multiply"

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        return marked("stored_dot", self._run)(*arrays)

    def _run(self, x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        x = self.operand.arrange(x)
        x = x if self.operand.contraction == 1 else x.mT
        return self.multiply.product(x, data, scale)


@dataclasses.dataclass(frozen=True)
class _Multiply:
    """A marked call: codes of the activation, their scales, and the weight's."""

    layout: ops.Layout
    recipe: Recipe
    tile: tuple[int, int]
    stored_tile: tuple[int, int]
    transposed: bool  # Whether codes are stored [n, k].
    weight_first: bool
    out_dtype: np.dtype
    implementation: str | None

    def __call__(self, *codes: jax.Array) -> jax.Array:
        return marked("stored_dot", self._run)(*codes)

    def _run(self, *codes: jax.Array) -> jax.Array:
        return self.product(QTensor(codes[0], codes[1], self.tile), *codes[2:])

    def product(
        self, x: jax.Array | QTensor, data: jax.Array, scale: jax.Array
    ) -> jax.Array:
        kernel = QTensor(data, scale, self.stored_tile)
        y = ops.static_weight_dot(
            "fp8_transform",
            x,
            kernel.T if self.transposed else kernel,
            out_dtype=self.out_dtype,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        y = y.T if self.weight_first else y
        return y.reshape(self.layout.out_shape)


def stored_equations(
    eqn: JaxprEqn,
    what: StoredDot,
    calls: Callable[..., tuple[list[JaxprEqn], list[Any]]],
    codes: dict[Hashable, list[Any]],
) -> list[JaxprEqn]:
    """Makes the equations that stand in for a `dot_general` of a stored weight.

    Args:
        eqn: the product.
        what: it becomes.
        calls: makes the equations of a function in the place of another equation, and
            the variables of its results.
        codes: made in this jaxpr so far; one activation is quantized once.
    """
    lhs, rhs = eqn.invars
    numbers = dimension_numbers(eqn)
    layout = ops.plan(aval_of(lhs).shape, aval_of(rhs).shape, numbers, "fp8_transform")
    first = what.first == "lhs"
    x, operand = (lhs, layout.lhs) if first else (rhs, layout.rhs)
    stored = what.stored
    multiply = _Multiply(
        layout,
        what.recipe,
        what.spec.tile,
        stored.tile,
        transposed=(what.contraction == 1) != stored.transposed,
        weight_first=not first,
        out_dtype=np.dtype(aval_of(eqn.outvars[0]).dtype),
        implementation=what.implementation,
    )
    eqns = []
    if what.split:
        whole = _Whole(operand, multiply)
        product, _ = calls(whole, eqn, x, stored.data, stored.scale)
    else:
        rows = _Rows(operand, what.spec, what.implementation)
        key = (x, rows, eqn.ctx)
        if key not in codes:
            eqns, codes[key] = calls(rows, eqn, x)
        product, _ = calls(multiply, eqn, *codes[key], stored.data, stored.scale)
    return [*eqns, *product[:-1], product[-1].replace(outvars=eqn.outvars)]
