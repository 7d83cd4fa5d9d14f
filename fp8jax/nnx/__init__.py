"""Flax NNX layers whose matrix products run in FP8."""

from fp8jax.nnx._linear import Linear

__all__ = ["Linear"]
