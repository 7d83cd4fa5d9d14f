"""RMS normalization and the products of what it gives, quantized as it is computed."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._explicit import summed_product, typed_as
from fp8jax.ops._gemm import check_inputs, recipe_for
from fp8jax.ops._product import (
    INPUT_CODES,
    MATRICES,
    Product,
    dgrad_of,
    matrix_product,
    multiply,
    named_codes,
    weight_codes,
    wgrad_of,
)
from fp8jax.ops._spread import Spread, spread
from fp8jax.ops._varying import vary_alike
from fp8jax.quant import quantize_rms_norm
from fp8jax.recipes import Recipe, recipe_or_default


def rms_norm_dot(
    x: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    epsilon: float = 1e-6,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    r"""$y_i = h W_i$ with $h = x / rms(x) \odot scale$, in FP8.

    The forward pass reads x once and writes h's codes, once for all weights: h is never
    written in 16 bits. It is not kept either: wgrad has it made again from x, which the
    norm's gradient needs anyway, so this keeps one array of x's size less than a norm
    and `fp8jax.dot_general` do, whatever the recipe's `residual` says of inputs.

    With a recipe that leaves a GEMM out of FP8, arrays of several dtypes, or arrays
    that may be split over devices, it is the norm and a `fp8jax.dot_general` a weight.

    Args:
        x: `[..., k]`, bfloat16, float16 or float32.
        scale: `[k]` of any float dtype: the norm's weight.
        weights: `[k, n_i]` each, as x; at least one.
        epsilon: added to the mean of squares.
        recipe: of all GEMMs; `recipes.deepseek_v3()` by default.
        implementation: as in `fp8jax.dot_general`.

    Returns:
        `[..., n_i]` for each weight, in the dtype of `x` and the weight, or what
        `jax.lax.dot_general` gives of two.

    Raises:
        ValueError: If dtypes or shapes do not fit, or without a weight.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated twice, or in forward mode.

    Error: as the norm and `dot_general` apart, but that on a GPU 1/rms(x) is summed in
    another order: (k + 4) 2^-24 of itself, which moves a code where it lies at a tie.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    name = "rms_norm_dot"
    recipe = recipe_or_default(name, recipe)
    recipe = recipe_for(name, recipe, x, *weights)
    for w in weights:
        check_inputs(name, x, w)
    side = x.shape[-1:]
    fits = all(w.ndim == 2 and w.shape[:1] == side for w in weights)
    if not weights or not side or not fits or scale.shape != side:
        raise ValueError(
            f"{name} takes x [..., k], scale [k] and weights [k, n], one at least, got "
            f"{x.shape=}, {scale.shape=} and {[w.shape for w in weights]}."
        )
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"{name} takes a float scale, got scale.dtype={scale.dtype}.")
    how: Any = {"recipe": recipe, "implementation": implementation}
    run = functools.partial(_norm_and_products, name, epsilon, **how)
    return typed_as(functools.partial(_plain, epsilon), run, x, scale, *weights)


def _plain(
    epsilon: float, x: jax.Array, scale: jax.Array, *weights: jax.Array
) -> tuple[jax.Array, ...]:
    h = rms_norm(epsilon, x, scale)
    return tuple(summed_product(h, w) for w in weights)


def _norm_and_products(
    name: str,
    epsilon: float,
    x: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    recipe: Recipe,
    implementation: str | None,
) -> tuple[jax.Array, ...]:
    rows = x.reshape(-1, x.shape[-1])
    in_fp8 = None not in (recipe.fprop, recipe.dgrad, recipe.wgrad)
    one_device = spread(x, scale, *weights) == Spread.ONE
    if in_fp8 and one_device and all(x.dtype == w.dtype for w in weights):
        products = tuple(
            matrix_product(name, rows.shape, w, recipe, implementation) for w in weights
        )
        arrays = vary_alike((rows, scale, weights))
        ys: Any = _fused(_Static(products, epsilon), *arrays)
    else:
        h = rms_norm(epsilon, rows, scale)
        how: Any = {"recipe": recipe, "implementation": implementation}
        ys = [dot_general(h, w, MATRICES, **how) for w in weights]
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in ys)


def rms_norm(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    """What `quantize_rms_norm` quantizes, in 16 bits where x has 16."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    h = (wide * lax.rsqrt(mean + epsilon)) * scale
    return h.astype(x.dtype)


class _Static(NamedTuple):
    """The product with each weight, and the norm's epsilon."""

    products: tuple[Product, ...]
    epsilon: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    static: _Static, x: jax.Array, scale: jax.Array, weights: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    return _forward(static, x, scale, weights)[0]


def _forward(
    static: _Static, x: jax.Array, scale: jax.Array, weights: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], Any]:
    products, epsilon = static
    first = products[0]
    fprop = first.recipe.fprop
    assert fprop is not None
    spec = fprop.lhs

    def normalized(x: jax.Array, scale: jax.Array) -> Any:
        return quantize_rms_norm(
            x, scale, spec, epsilon=epsilon, implementation=first.implementation
        )[0]

    q_h = named_codes(first.once(normalized)(x, scale), INPUT_CODES)
    pairs = [weight_codes(p, w) for p, w in zip(products, weights, strict=True)]
    ys = tuple(
        multiply(p, q_h, q_w) for p, (q_w, _) in zip(products, pairs, strict=True)
    )
    return ys, (x, scale, [kept for _, kept in pairs])


def _backward(static: _Static, kept: Any, douts: tuple[jax.Array, ...]) -> Any:
    products, epsilon = static
    first = products[0]
    dgrad, wgrad = first.recipe.dgrad, first.recipe.wgrad
    assert dgrad is not None
    assert wgrad is not None
    x, scale, weights = kept
    h, norm_vjp = jax.vjp(functools.partial(rms_norm, epsilon), x, scale)
    q_h_t = first.quantize(h, 0, wgrad.lhs)
    dhs, dweights = [], []
    for product, w, dout in zip(products, weights, douts, strict=True):
        q_dout, q_dout_t = product.quantize_both(dout, 1, dgrad.lhs, wgrad.rhs)
        dhs.append(dgrad_of(product, dgrad, w, q_dout))
        dweights.append(wgrad_of(product, q_h_t, q_dout_t))
    return *norm_vjp(functools.reduce(operator.add, dhs)), tuple(dweights)


def _backward_once(
    static: _Static, kept: Any, douts: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    run = functools.partial(_backward, static)
    return static.products[0].once(run)(kept, douts)


_fused.defvjp(_forward, _backward_once)
