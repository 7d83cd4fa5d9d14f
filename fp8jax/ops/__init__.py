"""Operations with gradients, given a recipe."""

from fp8jax.matmul import MARK, gemm_implementation
from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._gemm import (
    INPUT_DTYPES,
    in_contraction_order,
    multiply_operands,
    output_dtype,
    quantize_operand,
    quantized_dot,
)
from fp8jax.ops._layout import Layout, Operand, plan
from fp8jax.ops._static_weight import static_weight_dot

__all__ = [
    "INPUT_DTYPES",
    "MARK",
    "Layout",
    "Operand",
    "dot_general",
    "gemm_implementation",
    "in_contraction_order",
    "multiply_operands",
    "output_dtype",
    "plan",
    "quantize_operand",
    "quantized_dot",
    "static_weight_dot",
]
