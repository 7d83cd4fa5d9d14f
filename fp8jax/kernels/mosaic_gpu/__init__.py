"""The kernels in Pallas Mosaic GPU, for Hopper (compute capability 9.0)."""

from fp8jax.kernels.mosaic_gpu._gemm import gemm
from fp8jax.kernels.mosaic_gpu._quantize import quantize, quantize_both
from fp8jax.kernels.mosaic_gpu._swiglu import quantize_swiglu, quantize_swiglu_gradient

__all__ = [
    "gemm",
    "quantize",
    "quantize_both",
    "quantize_swiglu",
    "quantize_swiglu_gradient",
]
