"""The product of inference: an activation quantized online, a weight stored in FP8."""

import jax
import numpy as np

from fp8jax.matmul import scaled_matmul
from fp8jax.ops._derivatives import refuse_derivatives
from fp8jax.ops._gemm import INPUT_DTYPES
from fp8jax.quant import QTensor, quantize
from fp8jax.recipes import Recipe, check_recipe, deepseek_v3


def static_weight_dot(
    name: str,
    x: jax.Array,
    kernel: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x [..., k]` times `kernel [k, n]`, whose codes stay as they are stored.

    `y = q(x) kernel`: x is quantized as the recipe's `fprop.lhs` says, the weight never
    inflated.

    Args:
        name: of the caller, for errors.
        x: bfloat16, float16 or float32.
        kernel: with tiles of 128 along k.
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
    recipe = deepseek_v3() if recipe is None else recipe
    check_recipe(name, recipe)
    if recipe.fprop is None:
        raise ValueError(
            f"{name} with a QTensor kernel takes a recipe whose fprop is in FP8, got "
            f"{recipe}; dequantize the kernel for a product without."
        )
    if np.dtype(x.dtype) not in INPUT_DTYPES or np.dtype(out_dtype) not in INPUT_DTYPES:
        raise ValueError(
            f"{name} with a QTensor kernel takes and gives bfloat16, float16 or "
            f"float32, got {x.dtype} and {np.dtype(out_dtype)}."
        )
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} takes x [..., k] and a kernel [k, n], got {x.shape} and "
            f"{kernel.shape}."
        )
    spec = recipe.fprop.lhs

    def product(x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        q_x = quantize(x, spec, implementation=implementation)
        weight = QTensor(data, scale, kernel.tile).T
        return scaled_matmul(
            q_x, weight, out_dtype=out_dtype, implementation=implementation
        )

    message = (
        f"{name} with a QTensor kernel has no gradient: it is for inference. Train "
        "with an array as the kernel."
    )
    rows = x.reshape(-1, x.shape[-1])
    y = refuse_derivatives(product, message)(rows, kernel.data, kernel.scale)
    return y.reshape(*x.shape[:-1], kernel.shape[1])
