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
    output_dtype,
    quantize_along,
    quantize_both_ways,
    quantized_dot,
)
from fp8jax.ops._layout import Operand, plan
from fp8jax.ops._spread import Spread, spread
from fp8jax.quant import QTensor, QuantSpec
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


_ONE_DERIVATIVE = (
    "dot_general in FP8 has a gradient, but no forward-mode and no second derivative: "
    "rounding to FP8 is a step function. For those take recipe=fp8jax.recipes.bf16(), "
    "or apply fp8jax.fp8_transform outside of all differentiation."
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(product: _Product, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(product, x, w)


def _forward(product: _Product, x: jax.Array, w: jax.Array) -> jax.Array:
    gemm = product.recipe.fprop
    if gemm is None:
        return product.plain(x, w)
    contractions = product.x.contraction, product.w.contraction
    return product.gemm(x, w, contractions, gemm, product.out_dtype)


def _fprop(product: _Product, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    """The product, and of x and w what wgrad and dgrad will need.

    Codes that are kept, are kept as `[k, m]` and `[k, n]`.
    """
    recipe = product.recipe
    fprop, dgrad, wgrad = recipe.fprop, recipe.dgrad, recipe.wgrad
    if recipe.residual == "bf16":
        return _forward(product, x, w), (x, w)
    assert fprop is not None  # The recipe checks it of residuals in FP8.
    assert dgrad is not None
    assert wgrad is not None
    x_side, w_side = product.x.contraction, product.w.contraction
    q_x, q_x_t = product.quantize_both(x, x_side, fprop.lhs, wgrad.lhs)
    q_w, q_w_t = product.quantize_both(w, w_side, fprop.rhs, dgrad.rhs)
    if product.split:  # A product of codes alone would gather them.
        out = _forward(product, x, w)
    else:
        out = product.multiply(q_x, q_w, product.out_dtype)
    return out, (q_x_t, q_w_t)


def _backward(product: _Product, residuals: Any, dout: jax.Array) -> Any:
    x, w = residuals
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    if product.split:
        x, w = _as_stored(x, product.x), _as_stored(w, product.w)
        return _split_dgrad(product, x, w, dout), _split_wgrad(product, x, w, dout)
    q_dout = q_dout_t = None  # [m, n] for dgrad, [n, m] for wgrad
    if dgrad is not None and wgrad is not None:
        q_dout, q_dout_t = product.quantize_both(dout, 1, dgrad.lhs, wgrad.rhs)
    elif dgrad is not None:
        q_dout = product.quantize(dout, 1, dgrad.lhs)
    elif wgrad is not None:
        q_dout_t = product.quantize(dout, 0, wgrad.rhs)
    if dgrad is None or q_dout is None:
        dx = _plain_dgrad(product, x, w, dout)
    else:
        dx = _dgrad(product, dgrad, w, q_dout)
    if wgrad is None or q_dout_t is None:
        dw = _plain_wgrad(product, x, w, dout)
    else:
        dw = _wgrad(product, wgrad, x, q_dout_t)
    return dx, dw


def _fprop_once(product: _Product, x: jax.Array, w: jax.Array) -> Any:
    return refuse_derivatives(functools.partial(_fprop, product), _ONE_DERIVATIVE)(x, w)


def _backward_once(product: _Product, residuals: Any, dout: jax.Array) -> Any:
    run = functools.partial(_backward, product)
    return refuse_derivatives(run, _ONE_DERIVATIVE)(residuals, dout)


_matmul.defvjp(_fprop_once, _backward_once)


def _dgrad(product: _Product, spec: GemmSpec, w: Any, q_dout: QTensor) -> jax.Array:
    """`dx = dout wᵀ`, contracting n, stored as `x` is."""
    if isinstance(w, QTensor):
        q_w = w  # [k, n], of the forward pass
    else:
        q_w = product.quantize(w, 1 - product.w.contraction, spec.rhs)  # [k, n]
    dx = product.multiply(q_dout, q_w, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def _wgrad(product: _Product, spec: GemmSpec, x: Any, q_dout: QTensor) -> jax.Array:
    """`dw = xᵀ dout`, contracting the m tokens, stored as `w` is."""
    if isinstance(x, QTensor):
        q_x = x  # [k, m], of the forward pass
    else:
        q_x = product.quantize(x, 1 - product.x.contraction, spec.lhs)  # [k, m]
    if product.w.contraction == 0:
        return product.multiply(q_x, q_dout, product.w_dtype)  # [k, n]
    return product.multiply(q_dout, q_x, product.w_dtype)  # [n, k]


def _split_dgrad(
    product: _Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    """`_dgrad` as one call that XLA's partitioner can split."""
    spec = product.recipe.dgrad
    if spec is None:
        return _plain_dgrad(product, x, w, dout)
    contractions = 1, 1 - product.w.contraction
    dx = product.gemm(dout, w, contractions, spec, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def _split_wgrad(
    product: _Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    """`_wgrad` as one call that XLA's partitioner can split."""
    spec = product.recipe.wgrad
    if spec is None:
        return _plain_wgrad(product, x, w, dout)
    tokens = 1 - product.x.contraction
    if product.w.contraction == 0:
        return product.gemm(x, dout, (tokens, 0), spec, product.w_dtype)  # [k, n]
    swapped = GemmSpec(spec.rhs, spec.lhs)
    return product.gemm(dout, x, (0, tokens), swapped, product.w_dtype)  # [n, k]


def _plain_dgrad(
    product: _Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    return jax.vjp(lambda x: product.plain(x, w), x)[1](dout)[0]


def _plain_wgrad(
    product: _Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    return jax.vjp(lambda w: product.plain(x, w), w)[1](dout)[0]


def _as_stored(x: Any, operand: Operand) -> jax.Array:
    """A residual as an array: quantized again in the same tiles, it has its codes."""
    if not isinstance(x, QTensor):
        return x
    return (x if operand.contraction == 0 else x.T).dequantize()
