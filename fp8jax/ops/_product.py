"""One `y = x w` and its three GEMMs: what each quantizes, and what is kept between."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fp8jax import numerics
from fp8jax.matmul import scaled_matmul
from fp8jax.ops._gemm import quantize_along, quantize_both_ways, quantized_dot
from fp8jax.ops._layout import Operand, plan
from fp8jax.quant import QTensor, QuantSpec
from fp8jax.recipes import GemmSpec, Recipe

# What `jax.checkpoint`'s policies know our arrays by: `fp8jax.checkpoint_policies`.
INPUT_CODES, WEIGHT_CODES, PRODUCT = "fp8jax_input", "fp8jax_weight", "fp8jax_product"

# Of `lax.dot_general`, for x [m, k] and w [k, n].
MATRICES = (((1,), (0,)), ((), ()))

ONE_DERIVATIVE = (
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
    split: bool = False  # Whether XLA may split the arrays over devices.

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` of arrays, part of a gradient rule, refusing to be differentiated."""
        return numerics.refuse_derivatives(fn, ONE_DERIVATIVE.format(name=self.name))

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

    def gemm(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        contractions: tuple[int, int],
        spec: GemmSpec,
        dtype: np.dtype,
    ) -> jax.Array:
        """Two matrices quantized and multiplied, contracting one dimension of each."""
        left, right = contractions
        return quantized_dot(
            lhs,
            rhs,
            (((left,), (right,)), ((), ())),
            spec.lhs,
            spec.rhs,
            preferred_element_type=dtype,
            implementation=self.implementation,
            split=self.split,
        )

    def multiply(self, lhs: QTensor, rhs: QTensor, dtype: np.dtype) -> jax.Array:
        return scaled_matmul(
            lhs, rhs, out_dtype=dtype, implementation=self.implementation
        )


def matrix_product(
    name: str,
    shape: tuple[int, ...],
    w: jax.Array,
    recipe: Recipe,
    implementation: str | None,
) -> Product:
    """That of x `[m, k]` of this shape and w `[k, n]`, everything in w's dtype."""
    layout = plan(shape, w.shape, MATRICES, name)
    return Product(
        name=name,
        x=layout.lhs,
        w=layout.rhs,
        out_dtype=w.dtype,
        x_dtype=w.dtype,
        w_dtype=w.dtype,
        precision=None,
        recipe=recipe,
        implementation=implementation,
    )


def named_codes(tree: Any, name: str) -> Any:
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
    return _codes(product, x, product.x.contraction, "lhs", INPUT_CODES)


def weight_codes(product: Product, w: jax.Array) -> tuple[QTensor, Any]:
    """w for fprop, and what the recipe keeps of it for dgrad, codes as `[k, n]`."""
    return _codes(product, w, product.w.contraction, "rhs", WEIGHT_CODES)


def _codes(
    product: Product, x: jax.Array, side: int, operand: Literal["lhs", "rhs"], name: str
) -> tuple[QTensor, Any]:
    recipe = product.recipe
    fprop, dgrad, wgrad = recipe.fprop, recipe.dgrad, recipe.wgrad
    assert fprop is not None
    spec = getattr(fprop, operand)
    if recipe.residual != "fp8":
        run = product.once(lambda x: product.quantize(x, side, spec))
        return named_codes(run(x), name), x
    assert dgrad is not None  # The recipe checks it of residuals in FP8.
    assert wgrad is not None
    spec_t = wgrad.lhs if operand == "lhs" else dgrad.rhs
    run = product.once(lambda x: product.quantize_both(x, side, spec, spec_t))
    return named_codes(run(x), name)


def multiply(product: Product, q_x: QTensor, q_w: QTensor) -> jax.Array:
    """fprop of the codes."""
    return named_product(product.multiply(q_x, q_w, product.out_dtype))


def named_product(y: jax.Array) -> jax.Array:
    """fprop's result, as policies know it."""
    return checkpoint_name(y, PRODUCT)


def dgrad_of(product: Product, spec: GemmSpec, w: Any, q_dout: QTensor) -> jax.Array:
    """`dx = dout wᵀ`, contracting n, stored as `x` is."""
    if isinstance(w, QTensor):
        q_w = w  # [k, n], of the forward pass
    else:
        q_w = product.quantize(w, 1 - product.w.contraction, spec.rhs)  # [k, n]
    dx = product.multiply(q_dout, q_w, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def wgrad_input(product: Product, spec: GemmSpec, x: Any) -> QTensor:
    """x `[k, m]` for wgrad, from what `input_codes` keeps."""
    if isinstance(x, QTensor):
        return x
    return product.quantize(x, 1 - product.x.contraction, spec.lhs)


def wgrad_of(product: Product, q_x: QTensor, q_dout: QTensor) -> jax.Array:
    """`dw = xᵀ dout`, contracting the m tokens, stored as `w` is."""
    if product.w.contraction == 0:
        return product.multiply(q_x, q_dout, product.w_dtype)  # [k, n]
    return product.multiply(q_dout, q_x, product.w_dtype)  # [n, k]


def as_stored(x: Any, operand: Operand) -> jax.Array:
    """A residual as an array: quantized again in the same tiles, it has its codes."""
    if not isinstance(x, QTensor):
        return x
    return (x if operand.contraction == 0 else x.T).dequantize()
