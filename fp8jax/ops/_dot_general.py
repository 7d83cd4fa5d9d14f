"""`jax.lax.dot_general` with its three GEMMs in FP8."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from fp8jax.matmul import scaled_matmul
from fp8jax.ops._derivatives import refuse_derivatives
from fp8jax.ops._gemm import (
    check_inputs,
    in_contraction_order,
    output_dtype,
    quantize_along,
    quantized_dot,
)
from fp8jax.ops._layout import Operand, plan
from fp8jax.ops._spread import Spread, spread
from fp8jax.quant import QTensor, QuantSpec, quantize_both, requantize
from fp8jax.recipes import GemmSpec, Recipe, check_recipe, deepseek_v3


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` of an activation and a weight, by `recipe`.

    Forward and backward: `y = q(x) q(W)`, `dx = q(dy) q(W)ᵀ`, `dW = q(x)ᵀ q(dy)`, each
    operand quantized along that product's contraction. The gradient is that of the
    unquantized product, evaluated with quantized operands (straight through).

    Takes `jax.lax.dot_general`'s place in Flax's `dot_general=` as it is.

    Args:
        lhs: the activation, bfloat16, float16 or float32.
        rhs: the weight, likewise.
        dimension_numbers: as in `jax.lax.dot_general`; batch dimensions are mapped.
        precision: of the GEMMs that the recipe leaves out of FP8.
        preferred_element_type: dtype of the result; the operands' promoted by default.
        out_sharding: as in `jax.lax.dot_general`; only with `recipes.bf16()` so far.
        recipe: `recipes.deepseek_v3()` by default.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.

    Returns:
        An array of the shape and dtype that `jax.lax.dot_general` gives.

    Raises:
        ValueError: If dtypes, shapes or dimension numbers do not fit.
        NotImplementedError: If the implementation asked for cannot run, or for
            `out_sharding` with a GEMM in FP8.
        TypeError: When differentiated twice, or in forward mode.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    name = "dot_general"
    recipe = deepseek_v3() if recipe is None else recipe
    check_recipe(name, recipe)
    if recipe.is_off:
        return lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
        )
    if out_sharding is not None:
        raise NotImplementedError(
            f"{name} in FP8 takes out_sharding=None, got {out_sharding}: constrain the "
            "result with jax.lax.with_sharding_constraint instead."
        )
    check_inputs(name, lhs, rhs)
    layout = plan(lhs.shape, rhs.shape, dimension_numbers, name)
    product = _Product(
        x=layout.lhs,
        w=layout.rhs,
        out_dtype=output_dtype(name, lhs, rhs, preferred_element_type),
        x_dtype=lhs.dtype,
        w_dtype=rhs.dtype,
        precision=lax.Precision(precision) if isinstance(precision, str) else precision,
        recipe=recipe,
        implementation=implementation,
        split=spread(lhs, rhs) != Spread.ONE,
    )
    run = functools.partial(_matmul, product)
    for _ in range(layout.batch_rank):
        run = jax.vmap(run)
    out = run(layout.lhs.arrange(lhs), layout.rhs.arrange(rhs))
    return out.reshape(layout.out_shape)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What is static in `y [m, n] = x w`, and the product's three GEMMs."""

    x: Operand
    w: Operand
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype
    precision: Any
    recipe: Recipe
    implementation: str | None
    split: bool

    def plain(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product as `lax.dot_general` computes it."""
        dims = (((self.x.contraction,), (self.w.contraction,)), ((), ()))
        return lax.dot_general(x, w, dims, self.precision, self.out_dtype)

    def quantize(self, x: jax.Array, contraction: int, spec: QuantSpec) -> QTensor:
        return quantize_along(x, contraction, spec, self.implementation)

    def quantize_both(
        self, x: jax.Array, contraction: int, spec: QuantSpec, other: QuantSpec
    ) -> tuple[QTensor, QTensor]:
        """Codes by `spec` along `contraction`, and by `other` along the other way."""
        specs = (spec, other.T) if contraction == 1 else (spec.T, other)
        q, q_other = quantize_both(x, specs, implementation=self.implementation)
        return (q, q_other.T) if contraction == 1 else (q.T, q_other)

    def requantize(self, q: QTensor, spec: QuantSpec) -> QTensor:
        if q.tile == spec.tile and q.dtype == spec.dtype:
            return q
        return requantize(q, spec, implementation=self.implementation)

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


_ONE_DERIVATIVE = (
    "dot_general in FP8 has a gradient, but no forward-mode and no second derivative: "
    "rounding to FP8 is a step function. For those take recipe=fp8jax.recipes.bf16(), "
    "or apply fp8jax.fp8_transform outside of all differentiation."
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(product: _Product, x: jax.Array, w: jax.Array) -> jax.Array:
    return _fprop(product, x, w)[0]


def _fprop(product: _Product, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    recipe = product.recipe
    if recipe.fprop is None:
        return product.plain(x, w), (x, w)
    contractions = product.x.contraction, product.w.contraction
    if recipe.residual == "bf16":
        gemm = recipe.fprop
        return product.gemm(x, w, contractions, gemm, product.out_dtype), (x, w)
    assert recipe.wgrad is not None, "a recipe with FP8 residuals has all GEMMs"
    q_x, x_by_tokens = product.quantize_both(
        x, contractions[0], recipe.fprop.lhs, recipe.wgrad.lhs
    )
    q_w = product.quantize(w, contractions[1], recipe.fprop.rhs)
    if product.split:  # A product of codes alone would gather them.
        out = product.gemm(x, w, contractions, recipe.fprop, product.out_dtype)
    else:
        out = product.multiply(q_x, q_w, product.out_dtype)
    return out, (x_by_tokens, q_w)


def _backward(product: _Product, residuals: Any, dout: jax.Array) -> Any:
    x, w = residuals
    recipe = product.recipe
    if recipe.dgrad is None:
        dx = jax.vjp(lambda x: product.plain(x, w), x)[1](dout)[0]
    else:
        dx = _dgrad(product, recipe.dgrad, w, dout)
    if recipe.wgrad is None:
        dw = jax.vjp(lambda w: product.plain(x, w), w)[1](dout)[0]
    else:
        dw = _wgrad(product, recipe.wgrad, x, dout)
    return dx, dw


def _fprop_once(product: _Product, x: jax.Array, w: jax.Array) -> Any:
    return refuse_derivatives(functools.partial(_fprop, product), _ONE_DERIVATIVE)(x, w)


def _backward_once(product: _Product, residuals: Any, dout: jax.Array) -> Any:
    run = functools.partial(_backward, product)
    return refuse_derivatives(run, _ONE_DERIVATIVE)(residuals, dout)


_matmul.defvjp(_fprop_once, _backward_once)


def _dgrad(product: _Product, spec: GemmSpec, w: Any, dout: jax.Array) -> jax.Array:
    """`dx = dout wᵀ`, contracting n, stored as `x` is."""
    if isinstance(w, QTensor) and not product.split:  # [n, k], of the forward pass
        q_dout = product.quantize(dout, 1, spec.lhs)  # [m, n]
        q_w = product.requantize(w.T, spec.rhs)  # [k, n]
        dx = product.multiply(q_dout, q_w, product.x_dtype)  # [m, k]
    else:
        w = _as_stored(w, product.w)
        contractions = 1, 1 - product.w.contraction
        dx = product.gemm(dout, w, contractions, spec, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def _wgrad(product: _Product, spec: GemmSpec, x: Any, dout: jax.Array) -> jax.Array:
    """`dw = xᵀ dout`, contracting the m tokens, stored as `w` is."""
    if isinstance(x, QTensor) and not product.split:
        q_x = x  # [k, m], of the forward pass
        q_dout = product.quantize(dout, 0, spec.rhs)  # [n, m]
        if product.w.contraction == 0:
            return product.multiply(q_x, q_dout, product.w_dtype)  # [k, n]
        return product.multiply(q_dout, q_x, product.w_dtype)  # [n, k]
    tokens = 1 - product.x.contraction
    if isinstance(x, QTensor):
        x = x.T
    x = _as_stored(x, product.x)
    if product.w.contraction == 0:
        return product.gemm(x, dout, (tokens, 0), spec, product.w_dtype)  # [k, n]
    swapped = GemmSpec(spec.rhs, spec.lhs)
    return product.gemm(dout, x, (0, tokens), swapped, product.w_dtype)  # [n, k]


def _as_stored(x: Any, operand: Operand) -> jax.Array:
    """A residual as an array; one in FP8 is decoded, as `requantize` would."""
    if not isinstance(x, QTensor):
        return x
    return in_contraction_order(x, operand).dequantize()
