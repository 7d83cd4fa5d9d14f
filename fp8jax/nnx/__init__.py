"""Flax NNX layers whose matrix products run in FP8."""

from fp8jax._extras import needed_by

with needed_by("fp8jax.nnx", "flax"):
    from fp8jax.nnx._attention import MultiHeadAttention
    from fp8jax.nnx._linear import Einsum, Linear, LinearGeneral
    from fp8jax.nnx._moe import ExpertLoad, MoE, RouterBias, balance
    from fp8jax.nnx._rms_norm import RMSNormLinear
    from fp8jax.nnx._swiglu import SwiGLU

__all__ = [
    "Einsum",
    "ExpertLoad",
    "Linear",
    "LinearGeneral",
    "MoE",
    "MultiHeadAttention",
    "RMSNormLinear",
    "RouterBias",
    "SwiGLU",
    "balance",
]
