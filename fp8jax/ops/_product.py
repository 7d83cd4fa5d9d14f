"""One `y = x w` and its three GEMMs: what each quantizes, and what is kept between."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax

from fp8jax.matmul import scaled_matmul
from fp8jax.ops._gemm import quantize_along, quantize_both_ways
from fp8jax.ops._layout import Operand
from fp8jax.quant import QTensor, QuantSpec, requantize
from fp8jax.recipes import GemmSpec, Recipe

ONE_DERIVATIVE = (
    "{name} in FP8 has a gradient, but no forward-mode and no second derivative: "
    "rounding to FP8 is a step function. For those take recipe=fp8jax.recipes.bf16(), "
    "or apply fp8jax.fp8_transform outside of all differentiation."
)


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static in `y [m, n] = x w`, and the product's three GEMMs."""

    x: Operand
    w: Operand
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype
    precision: Any
    recipe: Recipe
    implementation: str | None

    def plain(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product as `lax.dot_general` computes it."""
        dims = (((self.x.contraction,), (self.w.contraction,)), ((), ()))
        return lax.dot_general(x, w, dims, self.precision, self.out_dtype)

    def quantize(self, x: jax.Array, contraction: int, spec: QuantSpec) -> QTensor:
        return quantize_along(x, contraction, spec, self.implementation)

    def quantize_both(
        self, x: jax.Array, contraction: int, spec: QuantSpec, spec_t: QuantSpec
    ) -> tuple[QTensor, QTensor]:
        return quantize_both_ways(x, contraction, spec, spec_t, self.implementation)

    def requantize(self, q: QTensor, spec: QuantSpec) -> QTensor:
        if q.tile == spec.tile and q.dtype == spec.dtype:
            return q
        return requantize(q, spec, implementation=self.implementation)

    def multiply(self, lhs: QTensor, rhs: QTensor, dtype: np.dtype) -> jax.Array:
        return scaled_matmul(
            lhs, rhs, out_dtype=dtype, implementation=self.implementation
        )


def input_codes(product: Product, x: jax.Array) -> tuple[QTensor, Any]:
    """x for fprop, and what the recipe keeps of it for wgrad, codes as `[k, m]`."""
    fprop, wgrad = product.recipe.fprop, product.recipe.wgrad
    assert fprop is not None
    side = product.x.contraction
    if product.recipe.residual == "fp8_transposed":
        assert wgrad is not None  # The recipe checks it of residuals in FP8.
        return product.quantize_both(x, side, fprop.lhs, wgrad.lhs)
    q = product.quantize(x, side, fprop.lhs)
    return q, q.T if product.recipe.residual == "fp8" else x


def weight_codes(product: Product, w: jax.Array) -> tuple[QTensor, Any]:
    """w for fprop, and what the recipe keeps of it for dgrad, codes as `[k, n]`."""
    recipe = product.recipe
    fprop, dgrad = recipe.fprop, recipe.dgrad
    assert fprop is not None
    side = product.w.contraction
    if recipe.residual == "bf16":
        return product.quantize(w, side, fprop.rhs), w
    assert dgrad is not None  # The recipe checks it of residuals in FP8.
    if recipe.residual == "fp8" and dgrad.rhs != fprop.rhs.T:
        q = product.quantize(w, side, fprop.rhs)
        return q, q.T
    return product.quantize_both(w, side, fprop.rhs, dgrad.rhs)


def dgrad_of(product: Product, spec: GemmSpec, w: Any, q_dout: QTensor) -> jax.Array:
    """`dx = dout wᵀ`, contracting n, stored as `x` is."""
    if isinstance(w, QTensor):  # [k, n], of the forward pass
        q_w = product.requantize(w, spec.rhs)
    else:
        q_w = product.quantize(w, 1 - product.w.contraction, spec.rhs)  # [k, n]
    dx = product.multiply(q_dout, q_w, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def wgrad_input(product: Product, spec: GemmSpec, x: Any) -> QTensor:
    """x `[k, m]` for wgrad, from what `input_codes` keeps."""
    if isinstance(x, QTensor):
        return product.requantize(x, spec.lhs)
    return product.quantize(x, 1 - product.x.contraction, spec.lhs)


def wgrad_of(product: Product, q_x: QTensor, q_dout: QTensor) -> jax.Array:
    """`dw = xᵀ dout`, contracting the m tokens, stored as `w` is."""
    if product.w.contraction == 0:
        return product.multiply(q_x, q_dout, product.w_dtype)  # [k, n]
    return product.multiply(q_dout, q_x, product.w_dtype)  # [n, k]
