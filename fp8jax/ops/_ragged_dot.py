"""`jax.lax.ragged_dot` with its three GEMMs in FP8."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.ops._explicit import refuse_explicit
from fp8jax.ops._gemm import (
    check_inputs,
    checked_precision,
    output_dtype,
    recipe_for,
)
from fp8jax.ops._grouped_product import (
    ALIGNMENT,
    GroupedProduct,
    dgrad_of,
    input_codes,
    multiply,
    weight_codes,
    wgrad_input,
    wgrad_of,
)
from fp8jax.ops._spread import without_split
from fp8jax.ops._varying import vary_alike
from fp8jax.recipes import Recipe, recipe_or_default


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    out_sharding: Any = None,
    *,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` of tokens sorted by expert and the experts' weights.

    Forward and backward, for each group e of rows: `y_e = q(x_e) q(W_e)`,
    `dx_e = q(dy_e) q(W_e)ᵀ`, `dW_e = q(x_e)ᵀ q(dy_e)`, each operand quantized along
    that product's contraction; tiles along tokens begin anew with each group. Rows of
    no group are zero in y and dx. The gradient of a group without rows is zero.

    Args:
        lhs: `[m, k]`, bfloat16, float16 or float32, the first group's rows first.
        rhs: `[g, k, n]`, likewise.
        group_sizes: integers `[g]` on the device, rows of each group; any may be 0.
            Their sum is at most m.
        precision: of the GEMMs that the recipe leaves out of FP8.
        preferred_element_type: dtype of the result; by default `jax.lax.ragged_dot`'s,
            which of float16 and bfloat16 is bfloat16.
        group_offset, out_sharding: as in `jax.lax.ragged_dot`; only with
            `recipes.bf16()` so far.
        recipe: `recipes.deepseek_v3()` by default. It quantizes lhs and its gradients
            row by row, so tiles of more rows are for the weights, and for wgrad's x.
        implementation: as in `fp8jax.dot_general`.

    Returns:
        `[m, n]`, of the dtype that `jax.lax.ragged_dot` gives.

    Raises:
        ValueError: If dtypes or shapes do not fit.
        NotImplementedError: If the implementation asked for cannot run, or for
            `group_offset` or `out_sharding` with a GEMM in FP8.
        TypeError: When differentiated twice, or in forward mode.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    name = "ragged_dot"
    recipe = recipe_or_default(name, recipe)
    recipe = recipe_for(name, recipe, lhs, rhs)
    if recipe.is_off:
        return lax.ragged_dot(
            lhs,
            rhs,
            group_sizes,
            precision,
            preferred_element_type,
            group_offset,
            out_sharding,
        )
    for option, value in (
        ("group_offset", group_offset),
        ("out_sharding", out_sharding),
    ):
        if value is not None:
            raise NotImplementedError(
                f"{name} in FP8 takes {option}=None, got {value}; with "
                "recipe=fp8jax.recipes.bf16() it is jax.lax.ragged_dot."
            )
    product = grouped_product(
        name,
        lhs,
        rhs,
        group_sizes,
        dtype=preferred_element_type,
        precision=precision,
        recipe=recipe,
        implementation=implementation,
    )
    arrays = vary_alike((lhs, rhs, group_sizes.astype(jnp.int32)))
    return _matmul(product, *arrays)


def grouped_product(
    name: str,
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    precision: Any = None,
    recipe: Recipe,
    implementation: str | None,
    aligned: bool = False,
) -> GroupedProduct:
    """What is static in a product of these arrays.

    Raises:
        ValueError: On behalf of `name`, if they do not fit.
    """
    check_inputs(name, x, w)
    refuse_explicit(name, x, w, sizes)
    shape, dtypes = jnp.shape(sizes), jnp.result_type(sizes)
    fits = x.ndim == 2 and w.ndim == 3 and shape == w.shape[:1]
    if not fits or x.shape[1] != w.shape[1] or not jnp.issubdtype(dtypes, jnp.integer):
        raise ValueError(
            f"{name} takes rows [m, k], a weight [g, k, n] and integer group_sizes "
            f"[g], got {list(x.shape)}, {list(w.shape)} and {dtypes}{list(shape)}."
        )
    if aligned and x.shape[0] % ALIGNMENT:
        raise ValueError(
            f"{name} takes aligned groups in a multiple of {ALIGNMENT} rows, got "
            f"{x.shape[0]} rows."
        )
    return GroupedProduct(
        name=name,
        out_dtype=output_dtype(name, x, w, dtype),
        x_dtype=x.dtype,
        w_dtype=w.dtype,
        precision=checked_precision(precision, x, w),
        recipe=recipe,
        implementation=without_split(name, implementation, x, w, sizes),
        aligned=aligned,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    product: GroupedProduct, x: jax.Array, w: jax.Array, sizes: jax.Array
) -> jax.Array:
    return _fprop(product, x, w, sizes)[0]


def _fprop(
    product: GroupedProduct, x: jax.Array, w: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Any]:
    """The product, and of x and w what wgrad and dgrad will need."""
    if product.recipe.fprop is None:
        return product.plain(x, w, sizes), (x, w, sizes)
    q_x, x_kept = input_codes(product, x, sizes)
    q_w, w_kept = weight_codes(product, w)
    return multiply(product, q_x, q_w, sizes), (x_kept, w_kept, sizes)


def _backward(product: GroupedProduct, residuals: Any, dout: jax.Array) -> Any:
    x, w, sizes = residuals
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    q_dout = q_dout_t = None  # [m, n] for dgrad, [n, columns] for wgrad
    if wgrad is not None:
        spec = None if dgrad is None else dgrad.lhs
        q_dout, q_dout_t = product.quantize_both(dout, sizes, spec, wgrad.rhs)
    elif dgrad is not None:
        q_dout = product.quantize(dout, dgrad.lhs)
    if dgrad is None or q_dout is None:
        dx = jax.vjp(lambda x: product.plain(x, w, sizes), x)[1](dout)[0]
    else:
        dx = dgrad_of(product, dgrad, w, q_dout, sizes)
    if wgrad is None or q_dout_t is None:
        dw = jax.vjp(lambda w: product.plain(x, w, sizes), w)[1](dout)[0]
    else:
        q_x_t = wgrad_input(product, wgrad, x, sizes)
        dw = wgrad_of(product, q_x_t, q_dout_t, sizes)
    return dx, dw


def _backward_once(product: GroupedProduct, residuals: Any, dout: jax.Array) -> Any:
    run = product.once(functools.partial(_backward, product))
    return *run(residuals, dout), None


_matmul.defvjp(_fprop, _backward_once)
