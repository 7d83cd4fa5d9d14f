"""Flax Linen layers whose matrix products run in FP8."""

from fp8jax.linen._dense import Dense

__all__ = ["Dense"]
