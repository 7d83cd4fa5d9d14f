"""Operations with gradients, given a recipe."""

from fp8jax.matmul import MARK, gemm_implementation
from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._gemm import quantized_dot

__all__ = ["MARK", "dot_general", "gemm_implementation", "quantized_dot"]
