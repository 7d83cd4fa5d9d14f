"""One `y = x w`, each row by its group's matrix, and its three GEMMs.

`_product.py` with groups: what each GEMM quantizes, and what is kept between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from fp8jax import numerics
from fp8jax.matmul import grouped_matmul, grouped_wgrad
from fp8jax.ops._product import (
    INPUT_CODES,
    ONE_DERIVATIVE,
    WEIGHT_CODES,
    named_codes,
    named_product,
)
from fp8jax.quant import (
    QTensor,
    QuantSpec,
    quantize,
    quantize_both,
    quantize_grouped,
    quantize_transposed,
)
from fp8jax.recipes import GemmSpec, Recipe

ALIGNMENT = 128  # Rows of an aligned group come in so many: a tile along tokens.

# Which of a layer's products, by how the operands are stored.
RaggedForm = Literal["fprop", "dgrad", "wgrad"]

_NO_GRADIENT = (
    "quantized_ragged_dot has no gradient: rounding to FP8 is a step function. Use "
    "fp8jax.ragged_dot, whose gradients are products in FP8 themselves; to "
    "differentiate a function that fp8_transform has rewritten as a whole step, "
    "apply fp8_transform after the differentiation."
)


@dataclasses.dataclass(frozen=True)
class GroupedProduct:
    """What is static in `y [m, n] = x [m, k] w [g, k, n]`.

    Methods take `sizes`, int32 [g]: rows of each group, the first group's first. Rows
    that are left over are zero in y and dx, and count for no dw.

    Where groups are `aligned`, m and every size are multiples of `ALIGNMENT`. Then each
    group begins where a tile along tokens does, in the codes of the whole matrix as in
    those that `quantize_grouped` lays out: dense quantization makes what wgrad reads.
    """

    name: str  # Of the function that errors are about.
    out_dtype: np.dtype
    x_dtype: np.dtype
    w_dtype: np.dtype
    precision: Any
    recipe: Recipe
    implementation: str | None
    aligned: bool = False

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` of arrays, part of a gradient rule, refusing to be differentiated."""
        return numerics.refuse_derivatives(fn, ONE_DERIVATIVE.format(name=self.name))

    def plain(self, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        """The product as `lax.ragged_dot` computes it."""
        return lax.ragged_dot(x, w, sizes, self.precision, self.out_dtype)

    def quantize(self, x: jax.Array, spec: QuantSpec) -> QTensor:
        return quantize(x, spec, implementation=self.implementation)

    def quantize_both(
        self, x: jax.Array, sizes: jax.Array, spec: QuantSpec | None, spec_t: QuantSpec
    ) -> tuple[QTensor | None, QTensor]:
        """`[m, k]` and `[k, columns]` codes of rows, the latter's groups apart."""
        how: Any = {"implementation": self.implementation}
        if not self.aligned:
            return quantize_grouped(x, sizes, spec, spec_t, **how)
        if spec is None:
            return None, quantize_transposed(x, spec_t, **how)
        return quantize_both(x, spec, spec_t, **how)

    def matmul(
        self, lhs: QTensor, rhs: QTensor, sizes: jax.Array, dtype: np.dtype
    ) -> jax.Array:
        return grouped_matmul(
            lhs, rhs, sizes, out_dtype=dtype, implementation=self.implementation
        )


# The names are outside of `once`: policies do not look into it.
def input_codes(
    product: GroupedProduct, x: jax.Array, sizes: jax.Array
) -> tuple[QTensor, Any]:
    """x for fprop, and what the recipe keeps of it for wgrad, codes as [k, columns]."""
    fprop, wgrad = product.recipe.fprop, product.recipe.wgrad
    assert fprop is not None
    if product.recipe.residual != "fp8":
        run = product.once(lambda x: product.quantize(x, fprop.lhs))
        return named_codes(run(x), INPUT_CODES), x
    assert wgrad is not None  # The recipe checks it of residuals in FP8.
    run = product.once(lambda x, s: product.quantize_both(x, s, fprop.lhs, wgrad.lhs))
    return named_codes(run(x, sizes), INPUT_CODES)


def weight_codes(product: GroupedProduct, w: jax.Array) -> tuple[QTensor, Any]:
    """w `[g, n, k]` for fprop, and what is kept of it for dgrad, codes as [g, k, n]."""
    fprop, dgrad = product.recipe.fprop, product.recipe.dgrad
    implementation = product.implementation
    assert fprop is not None

    if product.recipe.residual != "fp8":
        run = product.once(
            lambda w: quantize_transposed(w, fprop.rhs, implementation=implementation)
        )
        return named_codes(run(w), WEIGHT_CODES), w
    assert dgrad is not None
    run = product.once(
        lambda w: quantize_both(w, dgrad.rhs, fprop.rhs, implementation=implementation)
    )
    kept, q_w = named_codes(run(w), WEIGHT_CODES)
    return q_w, kept


def multiply(
    product: GroupedProduct, q_x: QTensor, q_w: QTensor, sizes: jax.Array
) -> jax.Array:
    """fprop of the codes."""
    return named_product(product.matmul(q_x, q_w, sizes, product.out_dtype))


def dgrad_of(
    product: GroupedProduct, spec: GemmSpec, w: Any, q_dout: QTensor, sizes: jax.Array
) -> jax.Array:
    """`dx = dout wᵀ`, contracting n, from what `weight_codes` keeps."""
    q_w = w if isinstance(w, QTensor) else product.quantize(w, spec.rhs)  # [g, k, n]
    return product.matmul(q_dout, q_w, sizes, product.x_dtype)


def wgrad_input(
    product: GroupedProduct, spec: GemmSpec, x: Any, sizes: jax.Array
) -> QTensor:
    """x `[k, columns]` for wgrad, from what `input_codes` keeps."""
    if isinstance(x, QTensor):
        return x
    return product.quantize_both(x, sizes, None, spec.lhs)[1]


def wgrad_of(
    product: GroupedProduct, q_x: QTensor, q_dout: QTensor, sizes: jax.Array
) -> jax.Array:
    """`dw = xᵀ dout` of each group, contracting its rows: zero where there are none."""
    return grouped_wgrad(
        q_x,
        q_dout,
        sizes,
        out_dtype=product.w_dtype,
        implementation=product.implementation,
    )


def quantized_ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: jax.Array,
    form: RaggedForm,
    lhs_spec: QuantSpec,
    rhs_spec: QuantSpec,
    *,
    out_dtype: np.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """One product of rows in groups in FP8, without a gradient rule.

    | form | lhs | rhs | result |
    |---|---|---|---|
    | `"fprop"` | x `[m, k]` | w `[g, k, n]` | `[m, n]` |
    | `"dgrad"` | dout `[m, n]` | w `[g, k, n]` | `[m, k]` |
    | `"wgrad"` | x `[m, k]` | dout `[m, n]` | `[g, k, n]` |

    Args:
        lhs, rhs: bfloat16, float16 or float32.
        sizes: integers `[g]`, rows of each group.
        form: which product it is.
        lhs_spec, rhs_spec: in the `[free, contraction]` orientation.
        out_dtype: of the result.
        implementation: as in `grouped_matmul`.

    Raises:
        TypeError: When differentiated.
    """
    how: Any = {"implementation": implementation}

    def run(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        sizes = sizes.astype(np.int32)
        if form == "wgrad":
            _, q_lhs = quantize_grouped(lhs, sizes, None, lhs_spec, **how)
            _, q_rhs = quantize_grouped(rhs, sizes, None, rhs_spec, **how)
            return grouped_wgrad(q_lhs, q_rhs, sizes, out_dtype=out_dtype, **how)
        along = quantize_transposed if form == "fprop" else quantize
        q_lhs, q_rhs = quantize(lhs, lhs_spec, **how), along(rhs, rhs_spec, **how)
        return grouped_matmul(q_lhs, q_rhs, sizes, out_dtype=out_dtype, **how)

    return numerics.refuse_derivatives(run, _NO_GRADIENT)(lhs, rhs, sizes)
