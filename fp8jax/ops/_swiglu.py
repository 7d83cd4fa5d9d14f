"""The gated MLP block `(silu(x Wg) * (x Wu)) Wd`, quantized as it is computed."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._explicit import summed_product, typed_as
from fp8jax.ops._gemm import check_inputs, product_dtype, recipe_for
from fp8jax.ops._product import (
    MATRICES,
    Product,
    dgrad_of,
    input_codes,
    matrix_product,
    multiply,
    weight_codes,
    wgrad_input,
    wgrad_of,
)
from fp8jax.ops._spread import Spread, spread
from fp8jax.ops._varying import vary_alike
from fp8jax.quant import quantize_swiglu, quantize_swiglu_gradient
from fp8jax.recipes import Recipe, recipe_or_default


def swiglu_mlp(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""A gated MLP, $y = (silu(x W_g) \odot (x W_u)) W_d$, with nine GEMMs in FP8.

    x is quantized once for gate and up. What lies between the GEMMs goes to FP8 in one
    read: h from gate and up, and in the backward pass both their gradients, each along
    both sides, from dh, gate and up. Neither h nor the gradients are written to memory
    in 16 bits, and h is kept for nothing: wgrad has it made again from gate and up.

    With a recipe that leaves a GEMM out of FP8, arrays of several dtypes, or arrays
    that may be split over devices, it is three `fp8jax.dot_general` and the activation,
    in float32, between them.

    Args:
        x: `[..., k]`, bfloat16, float16 or float32.
        w_gate, w_up: `[k, hidden]`, likewise.
        w_down: `[hidden, n]`, likewise.
        recipe: of all nine GEMMs; `recipes.deepseek_v3()` by default. Its `residual`
            says what is kept of x and the weights; gate and up are kept as they are,
            or, with `"recompute"`, computed again.
        implementation: as in `fp8jax.dot_general`.

    Returns:
        `[..., n]` in the dtype of `x` and the weights, or what `jax.lax.dot_general`
        gives of several.

    Raises:
        ValueError: If dtypes or shapes do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated twice, or in forward mode.

    Error: against the three `dot_general` the activation and its gradients differ by
    some float32 ulps before their one rounding. A code may move by a step where that
    lies at a tie: two in a thousand of random numbers, and results agree to 40 dB.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    name = "swiglu_mlp"
    recipe = recipe_or_default(name, recipe)
    recipe = recipe_for(name, recipe, x, w_gate, w_up, w_down)
    for w in (w_gate, w_up, w_down):
        check_inputs(name, x, w)
    fits = x.ndim >= 1 and w_gate.shape == w_up.shape == (
        x.shape[-1],
        *w_down.shape[:1],
    )
    if not fits or w_down.ndim != 2:
        raise ValueError(
            f"{name} takes x [..., k], w_gate and w_up [k, hidden] and w_down [hidden, "
            f"n], got {x.shape=}, {w_gate.shape=}, {w_up.shape=}, {w_down.shape=}."
        )
    how: Any = {"recipe": recipe, "implementation": implementation}
    run = functools.partial(_gated, name, **how)
    return typed_as(_plain, run, x, w_gate, w_up, w_down)


def _plain(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    h = activation(summed_product(x, w_gate), summed_product(x, w_up))
    return summed_product(h, w_down)


def _gated(
    name: str,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    recipe: Recipe,
    implementation: str | None,
) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    weights = w_gate, w_up, w_down
    in_fp8 = None not in (recipe.fprop, recipe.dgrad, recipe.wgrad)
    one_device = spread(x, *weights) == Spread.ONE
    if in_fp8 and one_device and all(x.dtype == w.dtype for w in weights):
        hidden = (rows.shape[0], w_down.shape[0])
        into, out_of = (
            matrix_product(name, shape, w, recipe, implementation)
            for shape, w in ((rows.shape, w_gate), (hidden, w_down))
        )
        run: Any = functools.partial(_fused, _Products(into, out_of))
    else:
        how: Any = {"recipe": recipe, "implementation": implementation}
        run = functools.partial(_unfused, **how)
    run = jax.checkpoint(run) if recipe.residual == "recompute" else run
    y = run(*vary_alike((rows, *weights)))
    return y.reshape(*x.shape[:-1], w_down.shape[1])


def _unfused(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array, **how: Any
) -> jax.Array:
    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return dot_general(x, w, MATRICES, **how)

    gate, up = dot(x, w_gate), dot(x, w_up)
    return dot(activation(gate, up), w_down)


def activation(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, in float32, rounded once."""
    h = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return h.astype(product_dtype(gate, up))


class _Products(NamedTuple):
    """What is static: the product into the hidden features, and the one out of them."""

    into: Product
    out_of: Product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    products: _Products,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
) -> jax.Array:
    return _forward(products, x, w_gate, w_up, w_down)[0]


def _forward(
    products: _Products,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
) -> tuple[jax.Array, Any]:
    into, out_of = products
    fprop = into.recipe.fprop
    assert fprop is not None
    q_x, x_kept = input_codes(into, x)
    q_gate, gate_kept = weight_codes(into, w_gate)
    q_up, up_kept = weight_codes(into, w_up)
    q_down, down_kept = weight_codes(out_of, w_down)
    gate, up = multiply(into, q_x, q_gate), multiply(into, q_x, q_up)
    q_h, _ = quantize_swiglu(
        gate, up, fprop.lhs, None, implementation=into.implementation
    )
    assert q_h is not None
    y = multiply(out_of, q_h, q_down)
    return y, (x_kept, gate, up, gate_kept, up_kept, down_kept)


def _backward(products: _Products, kept: Any, dout: jax.Array) -> Any:
    into, out_of = products
    implementation = into.implementation
    dgrad, wgrad = into.recipe.dgrad, into.recipe.wgrad
    assert dgrad is not None
    assert wgrad is not None
    x, gate, up, w_gate, w_up, w_down = kept
    q_dout, q_dout_t = out_of.quantize_both(dout, 1, dgrad.lhs, wgrad.rhs)
    dh = dgrad_of(out_of, dgrad, w_down, q_dout)
    _, q_h_t = quantize_swiglu(gate, up, None, wgrad.lhs, implementation=implementation)
    assert q_h_t is not None
    dw_down = wgrad_of(out_of, q_h_t, q_dout_t)
    (q_dgate, q_dgate_t), (q_dup, q_dup_t) = quantize_swiglu_gradient(
        dh, gate, up, dgrad.lhs, wgrad.rhs, implementation=implementation
    )
    assert q_dgate is not None
    assert q_dgate_t is not None
    assert q_dup is not None
    assert q_dup_t is not None
    dx = dgrad_of(into, dgrad, w_gate, q_dgate) + dgrad_of(into, dgrad, w_up, q_dup)
    q_x_t = wgrad_input(into, wgrad, x)
    dw_gate = wgrad_of(into, q_x_t, q_dgate_t)
    dw_up = wgrad_of(into, q_x_t, q_dup_t)
    return dx, dw_gate, dw_up, dw_down


def _backward_once(products: _Products, kept: Any, dout: jax.Array) -> Any:
    run = functools.partial(_backward, products)
    return products.into.once(run)(kept, dout)


_fused.defvjp(_forward, _backward_once)
