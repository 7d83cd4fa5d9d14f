"""Flax NNX layers whose matrix products run in FP8."""

from fp8jax.nnx._attention import MultiHeadAttention
from fp8jax.nnx._linear import Einsum, Linear, LinearGeneral

__all__ = ["Einsum", "Linear", "LinearGeneral", "MultiHeadAttention"]
