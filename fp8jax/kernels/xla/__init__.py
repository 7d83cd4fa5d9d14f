"""The kernels in `jnp`: the oracle, and what runs where no FP8 tensor core is."""

from fp8jax.kernels.xla._gemm import gemm
from fp8jax.kernels.xla._gemm_swiglu import gemm_swiglu
from fp8jax.kernels.xla._grouped import (
    grouped_gemm,
    grouped_gemm_k,
    quantize_grouped,
)
from fp8jax.kernels.xla._map import quantize_map
from fp8jax.kernels.xla._quantize import quantize, quantize_both
from fp8jax.kernels.xla._rms_norm import quantize_add_rms_norm, quantize_rms_norm
from fp8jax.kernels.xla._swiglu import quantize_swiglu, quantize_swiglu_gradient

__all__ = [
    "gemm",
    "gemm_swiglu",
    "grouped_gemm",
    "grouped_gemm_k",
    "quantize",
    "quantize_add_rms_norm",
    "quantize_both",
    "quantize_grouped",
    "quantize_map",
    "quantize_rms_norm",
    "quantize_swiglu",
    "quantize_swiglu_gradient",
]
