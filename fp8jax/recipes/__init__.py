"""Recipes: which GEMM is computed in which numbers."""

from fp8jax.recipes._presets import (
    PRESETS,
    bf16,
    bf16_wgrad,
    blocked_wgrad,
    check_recipe,
    deepseek_v3,
    recipe_or_default,
)
from fp8jax.recipes._recipe import GemmSpec, Recipe, Residual
from fp8jax.recipes._rules import (
    DEFAULT_SKIPS,
    GEMM_NAMES,
    GemmName,
    Rule,
    first_match,
    skip_narrow,
)

__all__ = [
    "DEFAULT_SKIPS",
    "GEMM_NAMES",
    "PRESETS",
    "GemmName",
    "GemmSpec",
    "Recipe",
    "Residual",
    "Rule",
    "bf16",
    "bf16_wgrad",
    "blocked_wgrad",
    "check_recipe",
    "deepseek_v3",
    "first_match",
    "recipe_or_default",
    "skip_narrow",
]
