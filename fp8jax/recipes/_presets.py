"""Recipes that have been trained with, by name."""

import dataclasses
from typing import Any

from fp8jax import numerics
from fp8jax.quant import BLOCK_128X128, TILE_1X128
from fp8jax.recipes._recipe import GemmSpec, Recipe, Residual


def deepseek_v3(
    scale: numerics.ScaleKind = "pow2", residual: Residual = "bf16"
) -> Recipe:
    """All three GEMMs in E4M3: 1x128 activations and gradients, 128x128 weights.

    Args:
        scale: `"pow2"`, as the report trains, or `"fp32"`, for every operand.
        residual: what is kept for wgrad, see `Recipe`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.
    """
    tile = dataclasses.replace(TILE_1X128, scale=scale)
    block = dataclasses.replace(BLOCK_128X128, scale=scale)
    return Recipe(
        fprop=GemmSpec(lhs=tile, rhs=block),
        dgrad=GemmSpec(lhs=tile, rhs=block),
        wgrad=GemmSpec(lhs=tile, rhs=tile),
        residual=residual,
    )


def bf16_wgrad(scale: numerics.ScaleKind = "pow2") -> Recipe:
    """`deepseek_v3` with the weight gradient in its operands' own dtype."""
    return dataclasses.replace(deepseek_v3(scale), wgrad=None)


def bf16() -> Recipe:
    """Nothing in FP8: the other arm of a comparison."""
    return Recipe(fprop=None, dgrad=None, wgrad=None)


PRESETS = {f.__name__: f for f in (deepseek_v3, bf16_wgrad, bf16)}


def check_recipe(caller: str, recipe: Any) -> None:
    """Raises ValueError, on behalf of `caller`, for what is no `Recipe`."""
    if not isinstance(recipe, Recipe):
        presets = ", ".join(f"recipes.{name}()" for name in PRESETS)
        raise ValueError(
            f"{caller} takes a Recipe or None, got {recipe=}; presets are {presets}."
        )
