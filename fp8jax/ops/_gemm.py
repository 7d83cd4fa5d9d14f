"""One product of two arrays in FP8: quantize both along the contraction, multiply."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax import numerics
from fp8jax.matmul import scaled_matmul
from fp8jax.ops._layout import DimensionNumbers, Layout, Operand, plan
from fp8jax.ops._partition import Factorization, named, split_over_devices
from fp8jax.ops._partly_manual import Surroundings
from fp8jax.quant import (
    QTensor,
    QuantSpec,
    quantize,
    quantize_both,
    quantize_transposed,
)
from fp8jax.recipes import Recipe, bf16

INPUT_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))

NO_GRADIENT = (
    "quantized_dot has no gradient: rounding to FP8 is a step function. Use "
    "fp8jax.dot_general, whose gradients are products in FP8 themselves; to "
    "differentiate a function that fp8_transform has rewritten as a whole step, "
    "apply fp8_transform after the differentiation."
)


def check_inputs(name: str, lhs: jax.Array, rhs: jax.Array) -> None:
    """Raises ValueError, on behalf of `name`, for arrays that FP8 cannot stand for."""
    for side, x in (("lhs", lhs), ("rhs", rhs)):
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(
                f"{name} takes bfloat16, float16 or float32 arrays, got {side}.dtype="
                f"{x.dtype}."
            )


def recipe_for(name: str, recipe: Recipe, *arrays: Any) -> Recipe:
    """`recipe`, or that of plain products where an array is empty: no number is left.

    An empty shard or batch, an expert's device without tokens: zeros, as JAX's own.

    Raises:
        TypeError: On behalf of `name`, for a QTensor or no array in an array's place.
    """
    for x in arrays:
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} takes arrays, got {type(x).__name__}.")
        if isinstance(x, QTensor):
            raise TypeError(
                f"{name} takes arrays, which it quantizes, got a QTensor {x.shape}. "
                "Layers of fp8jax.nnx and fp8jax.linen with QTensors as kernels, and "
                "fp8_transform(forward)(params, x) with QTensors in params, multiply "
                "by codes; fp8jax.scaled_matmul multiplies two QTensors."
            )
    return recipe if all(x.size for x in arrays) else bf16()


def output_dtype(name: str, lhs: jax.Array, rhs: jax.Array, preferred: Any) -> np.dtype:
    """The dtype `lax.dot_general` gives: `preferred`, else by its own promotion."""
    dtype = product_dtype(lhs, rhs) if preferred is None else np.dtype(preferred)
    if dtype not in INPUT_DTYPES:
        raise ValueError(
            f"{name} takes preferred_element_type bfloat16, float16 or float32, got "
            f"{dtype}."
        )
    return dtype


def product_dtype(lhs: jax.Array, rhs: jax.Array) -> np.dtype:
    """What `lax.dot_general` gives of two dtypes, also where promotion is strict.

    It is not that of `jnp.promote_types`: of float16 and bfloat16 it is bfloat16.
    """
    return _product_dtype(np.dtype(lhs.dtype), np.dtype(rhs.dtype))


@functools.cache
def _product_dtype(lhs: np.dtype, rhs: np.dtype) -> np.dtype:
    scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (lhs, rhs))
    nothing = (((), ()), ((), ()))  # Contracted, and mapped.
    return jax.eval_shape(lambda x, y: lax.dot_general(x, y, nothing), *scalars).dtype


def checked_precision(precision: Any, lhs: jax.Array, rhs: jax.Array) -> Any:
    """A precision that `jax.lax.dot_general` takes of these, as a static argument.

    Raises:
        ValueError: In JAX's words, if it is none.
    """
    precision = tuple(precision) if isinstance(precision, list) else precision
    _check_precision(precision, np.dtype(lhs.dtype), np.dtype(rhs.dtype))
    return precision


@functools.cache
def _check_precision(precision: Any, lhs: np.dtype, rhs: np.dtype) -> None:
    avals = [jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (lhs, rhs)]
    numbers = ((1,), (0,)), ((), ())
    jax.eval_shape(lambda x, w: jax.lax.dot_general(x, w, numbers, precision), *avals)


def quantize_along(
    x: jax.Array, contraction: int, spec: QuantSpec, implementation: str | None
) -> QTensor:
    """`[free, contraction]` codes of a matrix that stores its contraction as it likes.

    Args:
        x: matrix, or several: `[*batch, rows, columns]`.
        contraction: its contracted dimension, 0 (rows) or 1 (columns).
        spec: for the `[free, contraction]` orientation.
        implementation: as in `quantize`.
    """
    if contraction == 1:
        return quantize(x, spec, implementation=implementation)
    return quantize_transposed(x, spec, implementation=implementation)


def quantize_both_ways(
    x: jax.Array,
    contraction: int,
    spec: QuantSpec,
    spec_t: QuantSpec,
    implementation: str | None,
) -> tuple[QTensor, QTensor]:
    """`quantize_along` one side of a matrix and along the other, in one read of it.

    Args:
        x: matrix, or several.
        contraction: the dimension that the first result contracts, 0 or 1.
        spec: of the first result, `[free, contraction]`.
        spec_t: of the second, `[contraction, free]`.
        implementation: as in `quantize`.
    """
    if contraction == 1:
        return quantize_both(x, spec, spec_t, implementation=implementation)
    q_t, q = quantize_both(x, spec_t, spec, implementation=implementation)
    return q, q_t


def quantized_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    lhs_spec: QuantSpec,
    rhs_spec: QuantSpec,
    *,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
    split: bool = False,
) -> jax.Array:
    """One `dot_general` in FP8, without a gradient rule.

    Args:
        lhs, rhs: bfloat16, float16 or float32 arrays.
        dimension_numbers: as in `jax.lax.dot_general`.
        lhs_spec, rhs_spec: in the `[free, contraction]` orientation; either side may be
            the one in 128x128 tiles.
        preferred_element_type: dtype of the result; `jax.lax.dot_general`'s by default.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.
        split: whether the arrays may be sharded: then XLA's partitioner is told how
            to split the product as it would the plain one, and each device runs the
            kernels on its shards.

    Returns:
        An array of the shape and dtype that `jax.lax.dot_general` gives.

    Raises:
        ValueError: If dtypes, shapes or dimension numbers do not fit.
        TypeError: When differentiated; `fp8jax.dot_general` has gradients.
    """
    name = "quantized_dot"
    check_inputs(name, lhs, rhs)
    layout = plan(lhs.shape, rhs.shape, dimension_numbers, name)
    out_dtype = output_dtype(name, lhs, rhs, preferred_element_type)
    if not (lhs.size and rhs.size):
        return jnp.zeros(layout.out_shape, out_dtype)
    specs = lhs_spec, rhs_spec
    if not split:
        return _whole(lhs, rhs, layout, specs, out_dtype, implementation)
    key = layout.numbers, specs, out_dtype, implementation, Surroundings.here()
    run = _split(lhs.ndim, rhs.ndim, *key)
    return numerics.refuse_derivatives(run, NO_GRADIENT)(lhs, rhs)


def _whole(
    lhs: jax.Array,
    rhs: jax.Array,
    layout: Layout,
    specs: tuple[QuantSpec, QuantSpec],
    out_dtype: np.dtype,
    implementation: str | None,
) -> jax.Array:
    q_lhs, q_rhs = (
        quantize_operand(x, operand, spec, implementation)
        for x, operand, spec in zip(
            (lhs, rhs), (layout.lhs, layout.rhs), specs, strict=True
        )
    )
    return multiply_operands(q_lhs, q_rhs, layout, out_dtype, implementation)


@functools.cache
def _split(
    lhs_rank: int,
    rhs_rank: int,
    numbers: DimensionNumbers,
    specs: tuple[QuantSpec, QuantSpec],
    out_dtype: np.dtype,
    implementation: str | None,
    here: Surroundings,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product of two arrays, which XLA may split over devices."""

    def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        layout = plan(lhs.shape, rhs.shape, numbers, "quantized_dot")
        return _whole(lhs, rhs, layout, specs, out_dtype, implementation)

    factors = Factorization.of(lhs_rank, rhs_rank, numbers)
    name = named("quantized_dot", numbers, specs, out_dtype, implementation, here)
    return split_over_devices(run, factors, name, here.mesh)


def quantize_operand(
    x: jax.Array, operand: Operand, spec: QuantSpec, implementation: str | None
) -> QTensor:
    """The first half of a product: codes of one operand, `[*batch, free, contraction]`.

    Args:
        x: as `dot_general` takes it.
        operand: how it becomes `[*batch, rows, columns]`.
        spec: for the `[free, contraction]` orientation.
        implementation: as in `quantize`.

    Raises:
        TypeError: When differentiated.
    """

    def run(x: jax.Array) -> QTensor:
        return quantize_along(x, operand.contraction, spec, implementation)

    return numerics.refuse_derivatives(run, NO_GRADIENT)(operand.arrange(x))


def quantize_operand_both(
    x: jax.Array,
    operand: Operand,
    spec: QuantSpec,
    spec_t: QuantSpec,
    implementation: str | None,
) -> tuple[QTensor, QTensor]:
    """`quantize_operand` for two products, which contract one side and the other.

    In one read of `x`, where the two specs differ in their tiles alone.

    Args:
        x, operand, spec, implementation: as in `quantize_operand`.
        spec_t: of the second result, `[*batch, contraction, free]`.
    """

    def run(x: jax.Array) -> tuple[QTensor, QTensor]:
        side = operand.contraction
        return quantize_both_ways(x, side, spec, spec_t, implementation)

    return numerics.refuse_derivatives(run, NO_GRADIENT)(operand.arrange(x))


def multiply_operands(
    lhs: QTensor,
    rhs: QTensor,
    layout: Layout,
    out_dtype: np.dtype,
    implementation: str | None,
) -> jax.Array:
    """The second half of a product: that of the codes.

    Args:
        lhs, rhs: `[*batch, free, contraction]`.
        layout: of the `dot_general`.
        out_dtype: of the result.
        implementation: as in `scaled_matmul`.
    """

    def run(lhs: QTensor, rhs: QTensor) -> jax.Array:
        return scaled_matmul(
            lhs, rhs, out_dtype=out_dtype, implementation=implementation
        )

    if layout.batch_rank:  # As one dimension: GPU kernels take one batch in a launch.
        run = jax.vmap(run)
        lhs, rhs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), (lhs, rhs))
    return run(lhs, rhs).reshape(layout.out_shape)
