"""The kernels in `jnp`: the oracle, and what runs where no FP8 tensor core is."""

from fp8jax.kernels.xla._gemm import gemm
from fp8jax.kernels.xla._quantize import quantize, quantize_both
from fp8jax.kernels.xla._rms_norm import quantize_rms_norm
from fp8jax.kernels.xla._swiglu import quantize_swiglu, quantize_swiglu_gradient

__all__ = [
    "gemm",
    "quantize",
    "quantize_both",
    "quantize_rms_norm",
    "quantize_swiglu",
    "quantize_swiglu_gradient",
]
