"""Flax Linen layers whose matrix products run in FP8."""

from fp8jax._extras import needed_by

with needed_by("fp8jax.linen", "flax"):
    from fp8jax.linen._attention import MultiHeadAttention, MultiHeadDotProductAttention
    from fp8jax.linen._dense import Dense, DenseGeneral
    from fp8jax.linen._einsum import Einsum
    from fp8jax.linen._moe import MoE, balance
    from fp8jax.linen._rms_norm import RMSNormDense
    from fp8jax.linen._swiglu import SwiGLU

__all__ = [
    "Dense",
    "DenseGeneral",
    "Einsum",
    "MoE",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "RMSNormDense",
    "SwiGLU",
    "balance",
]
