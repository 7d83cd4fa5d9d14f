"""`jax.lax.dot_general` with its three GEMMs in FP8."""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from fp8jax.ops._explicit import check_out_sharding, typed_as
from fp8jax.ops._gemm import (
    check_inputs,
    checked_precision,
    output_dtype,
    recipe_for,
)
from fp8jax.ops._layout import Layout, plan
from fp8jax.ops._product import (
    Product,
    as_stored,
    dgrad_of,
    input_codes,
    multiply,
    named_product,
    weight_codes,
    wgrad_input,
    wgrad_of,
)
from fp8jax.ops._spread import Spread, spread
from fp8jax.ops._varying import vary_alike
from fp8jax.recipes import GemmSpec, Recipe, recipe_or_default


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
        preferred_element_type: dtype of the result; by default `jax.lax.dot_general`'s,
            which of float16 and bfloat16 is bfloat16.
        out_sharding: as in `jax.lax.dot_general`, of arrays on an explicit mesh.
        recipe: `recipes.deepseek_v3()` by default.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.

    Returns:
        An array of the shape and dtype that `jax.lax.dot_general` gives.

    Raises:
        ValueError: If dtypes, shapes or dimension numbers do not fit.
        NotImplementedError: If the implementation asked for cannot run, or for
            `out_sharding` with a GEMM in FP8 where shardings are automatic.
        jax.sharding.ShardingTypeError: On an explicit mesh, as `jax.lax.dot_general`.
        TypeError: When differentiated twice, or in forward mode.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    name = "dot_general"
    recipe = recipe_or_default(name, recipe)
    recipe = recipe_for(name, recipe, lhs, rhs)
    plain = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if recipe.is_off:
        return plain(lhs, rhs)
    check_out_sharding(name, out_sharding, lhs, rhs)
    check_inputs(name, lhs, rhs)
    layout = plan(lhs.shape, rhs.shape, dimension_numbers, name)
    out_dtype = output_dtype(name, lhs, rhs, preferred_element_type)

    def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _product_of(
            lhs,
            rhs,
            layout,
            name=name,
            out_dtype=out_dtype,
            precision=precision,
            recipe=recipe,
            implementation=implementation,
        )

    return typed_as(plain, run, lhs, rhs)


def _product_of(
    lhs: jax.Array, rhs: jax.Array, layout: Layout, *, precision: Any, **static: Any
) -> jax.Array:
    product = Product(
        x=layout.lhs,
        w=layout.rhs,
        x_dtype=lhs.dtype,
        w_dtype=rhs.dtype,
        precision=checked_precision(precision, lhs, rhs),
        split=spread(lhs, rhs) != Spread.ONE,
        **static,
    )
    run = functools.partial(_matmul, product)
    x, w = vary_alike((layout.lhs.arrange(lhs), layout.rhs.arrange(rhs)))
    if product.split:  # Each dimension may be split for itself.
        for _ in range(layout.batch_rank):
            run = jax.vmap(run)
    elif layout.batch_rank:  # GPU kernels take one batch in a launch.
        run = jax.vmap(run)
        x, w = (operand.reshape(-1, *operand.shape[-2:]) for operand in (x, w))
    return run(x, w).reshape(layout.out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(product, x, w)


def _forward(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    gemm = product.recipe.fprop
    if gemm is None:
        return product.plain(x, w)
    contractions = product.x.contraction, product.w.contraction
    return product.gemm(x, w, contractions, gemm, product.out_dtype)


def _fprop(product: Product, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    """The product, and of x and w what wgrad and dgrad will need."""
    if product.recipe.fprop is None:
        return product.plain(x, w), (x, w)
    if product.split:  # A product of codes alone would gather them.
        y = product.once(functools.partial(_forward, product))(x, w)
        if product.recipe.residual != "fp8":
            return named_product(y), (x, w)
        # A kernel that XLA can split: it would gather the operands of a GPU's.
        product = dataclasses.replace(product, implementation="xla")
        kept = input_codes(product, x)[1], weight_codes(product, w)[1]
        return named_product(y), kept
    q_x, x_kept = input_codes(product, x)
    q_w, w_kept = weight_codes(product, w)
    return multiply(product, q_x, q_w), (x_kept, w_kept)


def _backward(product: Product, residuals: Any, dout: jax.Array) -> Any:
    x, w = residuals
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    if product.split:
        x, w = as_stored(x, product.x), as_stored(w, product.w)
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
        dx = dgrad_of(product, dgrad, w, q_dout)
    if wgrad is None or q_dout_t is None:
        dw = _plain_wgrad(product, x, w, dout)
    else:
        dw = wgrad_of(product, wgrad_input(product, wgrad, x), q_dout_t)
    return dx, dw


def _backward_once(product: Product, residuals: Any, dout: jax.Array) -> Any:
    return product.once(functools.partial(_backward, product))(residuals, dout)


_matmul.defvjp(_fprop, _backward_once)


def _split_dgrad(
    product: Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    """`_dgrad` as one call that XLA's partitioner can split."""
    spec = product.recipe.dgrad
    if spec is None:
        return _plain_dgrad(product, x, w, dout)
    contractions = 1, 1 - product.w.contraction
    dx = product.gemm(dout, w, contractions, spec, product.x_dtype)  # [m, k]
    return dx if product.x.contraction == 1 else dx.T


def _split_wgrad(
    product: Product, x: jax.Array, w: jax.Array, dout: jax.Array
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
    product: Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    return jax.vjp(lambda x: product.plain(x, w), x)[1](dout)[0]


def _plain_wgrad(
    product: Product, x: jax.Array, w: jax.Array, dout: jax.Array
) -> jax.Array:
    return jax.vjp(lambda w: product.plain(x, w), w)[1](dout)[0]
