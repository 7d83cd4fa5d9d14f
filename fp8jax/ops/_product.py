"""One `y = x w` and its three GEMMs: what each quantizes, and what is kept between."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fp8jax.matmul import scaled_matmul
from fp8jax.ops._derivatives import refuse_derivatives
from fp8jax.ops._gemm import quantize_along, quantize_both_ways
from fp8jax.ops._layout import Operand
from fp8jax.quant import QTensor, QuantSpec, requantize
from fp8jax.recipes import GemmSpec, Recipe

# What `jax.checkpoint`'s policies know our arrays by: `fp8jax.checkpoint_policies`.
INPUT_CODES, WEIGHT_CODES, PRODUCT = "fp8jax_input", "fp8jax_weight", "fp8jax_product"

_ONE_DERIVATIVE = (
    "{name} in FP8 has a gradient, but no forward-mode and no second derivative: "
    "rounding to FP8 is a step function. For those take recipe=fp8jax.recipes.bf16(), "
    "or apply fp8jax.fp8_transform outside of all differentiation."
)


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static in `y [m, n] = x w`, and the product's three GEMMs."""

    name: str  # Of the function that errors are about.
    x: Operand
    w: Operand
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype
    precision: Any
    recipe: Recipe
    implementation: str | None

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` of arrays, part of a gradient rule, refusing to be differentiated."""
        return refuse_derivatives(fn, _ONE_DERIVATIVE.format(name=self.name))

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


def _named(tree: Any, name: str) -> Any:
    """`checkpoint_name`, of codes by their bits.

    Whatever floats `jax.checkpoint` saves it rounds by `reduce_precision`, which takes
    E4M3's largest numbers, of the exponent that IEEE gives to infinity, for infinities.
    """

    def named(a: jax.Array) -> jax.Array:
        if a.dtype.itemsize > 1:
            return checkpoint_name(a, name)
        bits = lax.bitcast_convert_type(a, np.uint8)
        return lax.bitcast_convert_type(checkpoint_name(bits, name), a.dtype)

    return jax.tree.map(named, tree)


# The names are outside of `once`: policies do not look into it.
def input_codes(product: Product, x: jax.Array) -> tuple[QTensor, Any]:
    """x for fprop, and what the recipe keeps of it for wgrad, codes as `[k, m]`."""
    fprop, wgrad = product.recipe.fprop, product.recipe.wgrad
    assert fprop is not None
    side = product.x.contraction
    if product.recipe.residual == "fp8_transposed":
        assert wgrad is not None  # The recipe checks it of residuals in FP8.
        run = product.once(
            lambda x: product.quantize_both(x, side, fprop.lhs, wgrad.lhs)
        )
        return _named(run(x), INPUT_CODES)
    run = product.once(lambda x: product.quantize(x, side, fprop.lhs))
    q = _named(run(x), INPUT_CODES)
    return q, q.T if product.recipe.residual == "fp8" else x


def weight_codes(product: Product, w: jax.Array) -> tuple[QTensor, Any]:
    """w for fprop, and what the recipe keeps of it for dgrad, codes as `[k, n]`."""
    recipe = product.recipe
    fprop, dgrad = recipe.fprop, recipe.dgrad
    assert fprop is not None
    side = product.w.contraction
    transposed = recipe.residual == "fp8" and dgrad and dgrad.rhs != fprop.rhs.T
    if recipe.residual == "bf16" or transposed:
        run = product.once(lambda w: product.quantize(w, side, fprop.rhs))
        q = _named(run(w), WEIGHT_CODES)
        return q, q.T if transposed else w
    assert dgrad is not None  # The recipe checks it of residuals in FP8.
    run = product.once(lambda w: product.quantize_both(w, side, fprop.rhs, dgrad.rhs))
    return _named(run(w), WEIGHT_CODES)


def multiply(product: Product, q_x: QTensor, q_w: QTensor) -> jax.Array:
    """fprop of the codes."""
    return checkpoint_name(product.multiply(q_x, q_w, product.out_dtype), PRODUCT)


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
