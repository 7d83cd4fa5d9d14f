"""Products of quantized arrays."""

from fp8jax._dispatch import MARK, mark_of, marked
from fp8jax.matmul._grouped import grouped_matmul, grouped_wgrad
from fp8jax.matmul._grouped_implementation import grouped_implementation
from fp8jax.matmul._kernels_here import has_gpu_kernels
from fp8jax.matmul._scaled_matmul import gemm_implementation, scaled_matmul
from fp8jax.matmul._swiglu_matmul import swiglu_matmul

__all__ = [
    "MARK",
    "gemm_implementation",
    "grouped_implementation",
    "grouped_matmul",
    "grouped_wgrad",
    "has_gpu_kernels",
    "mark_of",
    "marked",
    "scaled_matmul",
    "swiglu_matmul",
]
