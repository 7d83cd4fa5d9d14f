"""Recipes: which GEMM is computed in which numbers."""

from fp8jax.recipes._presets import bf16, bf16_wgrad, deepseek_v3
from fp8jax.recipes._recipe import GemmSpec, Recipe, Residual
from fp8jax.recipes._rules import DEFAULT_SKIPS, Rule, first_match

__all__ = [
    "DEFAULT_SKIPS",
    "GemmSpec",
    "Recipe",
    "Residual",
    "Rule",
    "bf16",
    "bf16_wgrad",
    "deepseek_v3",
    "first_match",
]
