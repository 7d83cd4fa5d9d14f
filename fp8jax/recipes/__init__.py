"""Recipes: which GEMM is computed in which numbers."""

from fp8jax.recipes._presets import bf16, bf16_wgrad, deepseek_v3
from fp8jax.recipes._recipe import GemmSpec, Recipe, Residual

__all__ = [
    "GemmSpec",
    "Recipe",
    "Residual",
    "bf16",
    "bf16_wgrad",
    "deepseek_v3",
]
