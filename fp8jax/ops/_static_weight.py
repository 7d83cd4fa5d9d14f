"""Products of inference: an activation quantized online, weights stored in FP8."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fp8jax import numerics
from fp8jax.matmul import scaled_matmul, swiglu_matmul
from fp8jax.ops._gemm import INPUT_DTYPES
from fp8jax.ops._spread import without_split
from fp8jax.quant import QTensor, QuantSpec, quantize, quantize_rms_norm
from fp8jax.recipes import Recipe, check_recipe, deepseek_v3


def static_weight_dot(
    name: str,
    x: jax.Array | QTensor,
    kernel: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x [..., k]` times `kernel [k, n]`, whose codes stay as they are stored.

    `y = q(x) kernel`: x is quantized as the recipe's `fprop.lhs` says, the weight never
    inflated. An x that is a QTensor already serves several products with one
    quantization, or comes from a fused one.

    Args:
        name: of the caller, for errors.
        x: bfloat16, float16 or float32, or a QTensor with tiles of 128 along k.
        kernel: with tiles of 128 along k. On a GPU its codes should lie as
            `contraction_minor` lays them, or each call transposes them.
        out_dtype: bfloat16, float16 or float32.
        recipe: `recipes.deepseek_v3()` by default.
        implementation: as in `scaled_matmul`.

    Returns:
        `[..., n]` of `out_dtype`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the recipe has no FP8 fprop.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    spec = activation_spec(name, x, out_dtype, recipe)
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} takes x [..., k] and a kernel [k, n], got {x.shape} and "
            f"{kernel.shape}."
        )

    implementation = without_split(name, implementation, x, kernel)

    def product(x: jax.Array | QTensor, kernel: QTensor) -> jax.Array:
        return scaled_matmul(
            _quantized(x, spec, implementation),
            kernel.T,
            out_dtype=out_dtype,
            implementation=implementation,
        )

    y = without_derivative(name, product)(_rows(name, x), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def static_weight_rms_norm(
    name: str,
    x: jax.Array,
    scale: jax.Array,
    *kernels: QTensor,
    epsilon: float,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    r"""$y_i = q(h) W_i$ with $h = x / rms(x) \odot scale$, of weights stored in FP8.

    h goes to FP8 as it is computed, once for all kernels: a kernel for it and one for
    each product.

    Args:
        name, out_dtype, recipe, implementation: as in `static_weight_dot`.
        x: `[..., k]`, bfloat16, float16 or float32.
        scale: `[k]` of any float dtype: the norm's weight.
        kernels: `[k, n_i]` each, as the kernel there.
        epsilon: added to the mean of squares.

    Returns:
        `[..., n_i]` of `out_dtype` for each kernel.

    Raises:
        ValueError, NotImplementedError, TypeError: As `static_weight_dot` does; x may
            not be a QTensor.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    if isinstance(x, QTensor):
        raise ValueError(f"{name} normalizes its input: an array, got a QTensor.")
    spec = activation_spec(name, x, out_dtype, recipe)
    side = x.shape[-1:]
    fits = all(isinstance(w, QTensor) and w.ndim == 2 for w in kernels)
    fits = fits and bool(side) and all(w.shape[:1] == side for w in kernels)
    if not fits or scale.shape != side:
        kinds = ", ".join(f"{kind_of(w)} {list(w.shape)}" for w in kernels)
        raise ValueError(
            f"{name} takes x [..., k], a norm's scale [k] and QTensors [k, n], got "
            f"{x.shape}, {scale.shape} and {kinds}."
        )

    implementation = without_split(name, implementation, x, scale, kernels)

    def product(
        x: jax.Array, scale: jax.Array, *kernels: QTensor
    ) -> tuple[jax.Array, ...]:
        q, _ = quantize_rms_norm(
            x, scale, spec, epsilon=epsilon, implementation=implementation
        )
        how: Any = {"out_dtype": out_dtype, "implementation": implementation}
        return tuple(scaled_matmul(q, kernel.T, **how) for kernel in kernels)

    ys = without_derivative(name, product)(_rows(name, x), scale, *kernels)
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in ys)


def static_weight_swiglu(
    name: str,
    x: jax.Array | QTensor,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""A gated MLP, $(silu(x W_g) \odot (x W_u)) W_d$, of weights stored in FP8.

    x is quantized once for gate and up, and what lies between the products goes to FP8
    as it is computed: four kernels and a fifth for x; three in all for a few rows.

    Args:
        name, x, out_dtype, recipe, implementation: as in `static_weight_dot`.
        gate, up: `[k, hidden]`, as the kernel there.
        down: `[hidden, n]`, likewise.

    Returns:
        `[..., n]` of `out_dtype`, in which gate and up are rounded, too.

    Raises:
        ValueError, NotImplementedError, TypeError: As `static_weight_dot` does.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    spec = activation_spec(name, x, out_dtype, recipe)
    kernels = (gate, up, down)
    fits = x.ndim >= 1 and all(isinstance(w, QTensor) and w.ndim == 2 for w in kernels)
    fits = fits and gate.shape == up.shape == (x.shape[-1], *down.shape[:1])
    if not fits:
        kinds = ", ".join(f"{kind_of(w)} {list(w.shape)}" for w in kernels)
        raise ValueError(
            f"{name} takes x [..., k] and, once one of them is a QTensor, QTensors "
            f"[k, hidden] twice and [hidden, n], got {x.shape} and {kinds}."
        )

    implementation = without_split(name, implementation, x, kernels)

    def product(
        x: jax.Array | QTensor, gate: QTensor, up: QTensor, down: QTensor
    ) -> jax.Array:
        how: Any = {"implementation": implementation}
        q_x = _quantized(x, spec, implementation)
        q_h = swiglu_matmul(q_x, gate.T, up.T, spec, dtype=out_dtype, **how)
        return scaled_matmul(q_h, down.T, out_dtype=out_dtype, **how)

    y = without_derivative(name, product)(_rows(name, x), *kernels)
    return y.reshape(*x.shape[:-1], down.shape[1])


def check_quantized_input(name: str, x: Any, dtype: Any, *kernels: Any) -> None:
    """Raises ValueError, on behalf of a layer, if it cannot take x as a QTensor."""
    if isinstance(x, QTensor) and (
        dtype is None or not all(isinstance(w, QTensor) for w in kernels)
    ):
        kinds = ", ".join(map(kind_of, kernels))
        raise ValueError(
            f"{name} takes a QTensor as its input if its kernels are QTensors and it "
            f"has a dtype=, that of the output, got {kinds} and {dtype=}."
        )


def kind_of(x: Any) -> str:
    return "QTensor" if isinstance(x, QTensor) else "array"


def activation_spec(
    name: str,
    x: jax.Array | QTensor,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None,
) -> QuantSpec:
    """How activations are quantized; ValueError if a dtype or the recipe is not fit."""
    recipe = deepseek_v3() if recipe is None else recipe
    check_recipe(name, recipe)
    if recipe.fprop is None:
        raise ValueError(
            f"{name} with a QTensor kernel takes a recipe whose fprop is in FP8, got "
            f"{recipe}; dequantize the kernel for a product without."
        )
    is_float = isinstance(x, QTensor) or np.dtype(x.dtype) in INPUT_DTYPES
    if not is_float or np.dtype(out_dtype) not in INPUT_DTYPES:
        raise ValueError(
            f"{name} with a QTensor kernel takes and gives bfloat16, float16 or "
            f"float32, got {x.dtype} and {np.dtype(out_dtype)}."
        )
    return recipe.fprop.lhs


def _rows(name: str, x: jax.Array | QTensor) -> jax.Array | QTensor:
    """`x [..., k]` as a matrix."""
    if not isinstance(x, QTensor):
        return x.reshape(-1, x.shape[-1])
    x.check(name)
    if x.tile[0] != 1 and x.ndim > 2:  # A tile would span two matrices.
        raise ValueError(
            f"{name} takes a QTensor of more than two dimensions in tiles of one row, "
            f"got {x.shape} in tiles of {x.tile}."
        )
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x)


def _quantized(
    x: jax.Array | QTensor, spec: QuantSpec, implementation: str | None
) -> QTensor:
    if isinstance(x, QTensor):
        return x
    return quantize(x, spec, implementation=implementation)


def without_derivative(name: str, product: Callable[..., Any]) -> Callable[..., Any]:
    """`product` of arrays, part of one by QTensors; TypeError if differentiated."""
    return numerics.refuse_derivatives(
        product,
        f"{name} with a QTensor kernel has no gradient: it is for inference. Train "
        "with an array as the kernel.",
    )
