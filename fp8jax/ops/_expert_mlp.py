"""The gated MLP of a mixture of experts, each token by its expert's weights."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.ops._gemm import recipe_for
from fp8jax.ops._grouped_product import (
    GroupedProduct,
    dgrad_of,
    input_codes,
    multiply,
    weight_codes,
    wgrad_input,
    wgrad_of,
)
from fp8jax.ops._ragged_dot import grouped_product, ragged_dot
from fp8jax.ops._static_experts import static_weight_experts
from fp8jax.ops._swiglu import activation
from fp8jax.ops._varying import vary_alike
from fp8jax.quant import QTensor, quantize_swiglu, quantize_swiglu_gradient
from fp8jax.recipes import Recipe, recipe_or_default


def expert_mlp(
    x: jax.Array,
    w_gate: jax.Array | QTensor,
    w_up: jax.Array | QTensor,
    w_down: jax.Array | QTensor,
    group_sizes: jax.Array,
    *,
    recipe: Recipe | None = None,
    implementation: str | None = None,
    aligned: bool = False,
) -> jax.Array:
    r"""`fp8jax.ops.swiglu_mlp` of each group's rows: nine grouped GEMMs in FP8.

    $$y_e = (silu(x_e W_{g,e}) \odot (x_e W_{u,e})) W_{d,e}$$

    x is quantized once for gate and up, and h goes to FP8 as it is computed. Gate and
    up are kept for the backward pass, which makes h and its gradients from them again.
    Where groups are `aligned` those go to FP8 as they are computed, too, and every
    matrix goes there in one read of it for both its directions. Where they are not, a
    tile along tokens ends with its group, so h and its gradients are written in the
    dtype of x first, and rows are moved apart before they are quantized along tokens.

    With a recipe that leaves a GEMM out of FP8, or arrays of several dtypes, it is
    three `fp8jax.ragged_dot` and the activation, in float32, between them.

    For inference, or as a frozen base, all three weights may be QTensors: then their
    codes are what is multiplied, never inflated, in the gradient of x, too. On a GPU
    they should lie as `fp8jax.quant.contraction_minor` lays them.

    Args:
        x: `[rows, k]`, bfloat16, float16 or float32, the first expert's rows first.
        w_gate, w_up: `[experts, k, hidden]`, likewise, or QTensors in tiles of 128
            along k.
        w_down: `[experts, hidden, n]`, likewise.
        group_sizes: integers `[experts]`, rows of each; their sum is at most all.
        recipe: of all nine GEMMs; `recipes.deepseek_v3()` by default. Its `residual`
            says what is kept of x and the weights; gate and up are kept as they are,
            or, with `"recompute"`, computed again.
        implementation: as in `fp8jax.ragged_dot`.
        aligned: that rows and every group's size are multiples of 128. Sizes are on the
            device, so theirs are not checked: with others, weights' gradients would mix
            tokens of different experts. `fp8jax.ops.dispatch(..., align=128)` makes
            such groups. The result has the same bits with it and without.

    Returns:
        `[rows, n]` in the dtype of `x` and the weights, or what `jax.lax.ragged_dot`
        gives of several.
        Rows of no expert are zero.

    Raises:
        ValueError: If dtypes or shapes do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated twice, or in forward mode; where a QTensor is.

    Error: against the three `ragged_dot`, that of `swiglu_mlp` against three
    `dot_general`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, sections 2.1.2 and 3.3;
    Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    name = "expert_mlp"
    recipe = recipe_or_default(name, recipe)
    how: Any = {"recipe": recipe, "implementation": implementation}
    weights: Any = w_gate, w_up, w_down
    if any(isinstance(w, QTensor) for w in weights):
        gate, up, down = weights
        return static_weight_experts(name, x, gate, up, down, group_sizes, **how)
    recipe = how["recipe"] = recipe_for(name, recipe, x, *weights)
    for w in weights[:2]:
        into = grouped_product(name, x, w, group_sizes, **how, aligned=aligned)
    if w_gate.shape != w_up.shape or w_down.shape[:2] != w_gate.shape[::2]:
        raise ValueError(
            f"{name} takes w_gate and w_up [experts, k, hidden] and w_down [experts, "
            f"hidden, n], got {w_gate.shape=}, {w_up.shape=}, {w_down.shape=}."
        )
    if is_fused(recipe, x, *weights):
        run: Any = functools.partial(_fused, into)
    else:
        run = functools.partial(_unfused, **how)
    if recipe.residual == "recompute":
        run = jax.checkpoint(run)
    return run(*vary_alike((x, *weights, group_sizes.astype(jnp.int32))))


def is_fused(recipe: Recipe, x: jax.Array, *weights: jax.Array | QTensor) -> bool:
    """Whether `expert_mlp` of these is one rule with all nine GEMMs in FP8.

    Never with QTensors, whose dtype is that of their codes.
    """
    in_fp8 = None not in (recipe.fprop, recipe.dgrad, recipe.wgrad)
    return in_fp8 and all(x.dtype == w.dtype for w in weights)


def _unfused(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    sizes: jax.Array,
    **how: Any,
) -> jax.Array:
    gate, up = ragged_dot(x, w_gate, sizes, **how), ragged_dot(x, w_up, sizes, **how)
    return ragged_dot(activation(gate, up), w_down, sizes, **how)


class _Kept(NamedTuple):
    """What the forward pass keeps: x and weights as the recipe says."""

    x: Any
    gate: jax.Array
    up: jax.Array
    weights: tuple[Any, Any, Any]
    sizes: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    product: GroupedProduct,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    return _forward(product, x, w_gate, w_up, w_down, sizes)[0]


def _forward(
    product: GroupedProduct,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    sizes: jax.Array,
) -> tuple[jax.Array, _Kept]:
    fprop = product.recipe.fprop
    assert fprop is not None
    q_x, x_kept = input_codes(product, x, sizes)
    codes, kept = zip(
        *(weight_codes(product, w) for w in (w_gate, w_up, w_down)), strict=True
    )
    q_gate, q_up, q_down = codes
    gate, up = (multiply(product, q_x, q_w, sizes) for q_w in (q_gate, q_up))
    q_h, _ = quantize_swiglu(
        gate, up, fprop.lhs, None, implementation=product.implementation
    )
    assert q_h is not None
    y = multiply(product, q_h, q_down, sizes)
    return y, _Kept(x_kept, gate, up, kept, sizes)


def _backward(
    product: GroupedProduct, kept: _Kept, dout: jax.Array
) -> tuple[jax.Array, ...]:
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    assert dgrad is not None
    assert wgrad is not None
    x, gate, up, (w_gate, w_up, w_down), sizes = kept

    q_dout, q_dout_t = product.quantize_both(dout, sizes, dgrad.lhs, wgrad.rhs)
    assert q_dout is not None
    dh = dgrad_of(product, dgrad, w_down, q_dout, sizes)
    between = _aligned_between if product.aligned else _between
    q_h_t, (q_dgate, q_dgate_t), (q_dup, q_dup_t) = between(
        product, dh, gate, up, sizes
    )
    dw_down = wgrad_of(product, q_h_t, q_dout_t, sizes)
    dx = dgrad_of(product, dgrad, w_gate, q_dgate, sizes)
    dx += dgrad_of(product, dgrad, w_up, q_dup, sizes)
    q_x_t = wgrad_input(product, wgrad, x, sizes)
    dw_gate = wgrad_of(product, q_x_t, q_dgate_t, sizes)
    dw_up = wgrad_of(product, q_x_t, q_dup_t, sizes)
    return dx, dw_gate, dw_up, dw_down


def _between(
    product: GroupedProduct,
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    sizes: jax.Array,
) -> tuple[QTensor, tuple[Any, Any], tuple[Any, Any]]:
    """h for wgrad, and both ways the gradients of gate and up."""
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    assert dgrad is not None
    assert wgrad is not None
    h, gradient = jax.vjp(activation, gate, up)
    _, q_h_t = product.quantize_both(h, sizes, None, wgrad.lhs)
    q_dgate, q_dup = (
        product.quantize_both(d, sizes, dgrad.lhs, wgrad.rhs) for d in gradient(dh)
    )
    return q_h_t, q_dgate, q_dup


def _aligned_between(
    product: GroupedProduct,
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    sizes: jax.Array,
) -> tuple[QTensor, tuple[Any, Any], tuple[Any, Any]]:
    """`_between` where no tile spans two groups: nothing is written in 16 bits."""
    del sizes
    how: Any = {"implementation": product.implementation}
    dgrad, wgrad = product.recipe.dgrad, product.recipe.wgrad
    assert dgrad is not None
    assert wgrad is not None
    _, q_h_t = quantize_swiglu(gate, up, None, wgrad.lhs, **how)
    assert q_h_t is not None
    q_dgate, q_dup = quantize_swiglu_gradient(dh, gate, up, dgrad.lhs, wgrad.rhs, **how)
    return q_h_t, q_dgate, q_dup


def _backward_once(product: GroupedProduct, kept: _Kept, dout: jax.Array) -> Any:
    run = product.once(functools.partial(_backward, product))
    return *run(kept, dout), None


_fused.defvjp(_forward, _backward_once)
