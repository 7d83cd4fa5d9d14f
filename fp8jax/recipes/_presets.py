"""Recipes that have been trained with, by name."""

import dataclasses
from typing import Any

from fp8jax import numerics
from fp8jax._described import described
from fp8jax.quant import BLOCK_128X128, TILE_1X128, QuantSpec
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
    tile, block = _tiles(scale)
    return Recipe(
        fprop=GemmSpec(lhs=tile, rhs=block),
        dgrad=GemmSpec(lhs=tile, rhs=block),
        wgrad=GemmSpec(lhs=tile, rhs=tile),
        residual=residual,
    )


def blocked_wgrad(
    scale: numerics.ScaleKind = "pow2", residual: Residual = "bf16"
) -> Recipe:
    """`deepseek_v3` with `x` in 128x128 blocks where it makes the weight gradient.

    One scale for 128 tokens times 128 channels lets the GPU multiply by a number where
    `deepseek_v3` multiplies by a row: its weight gradient takes three quarters of the
    time. What a block costs in accuracy depends on how tokens differ in size:
    `benchmarks/wgrad_error.py` measures it.
    """
    tile, block = _tiles(scale)
    wgrad = GemmSpec(lhs=block, rhs=tile)
    return dataclasses.replace(deepseek_v3(scale, residual), wgrad=wgrad)


def bf16_wgrad(scale: numerics.ScaleKind = "pow2") -> Recipe:
    """`deepseek_v3` with the weight gradient in its operands' own dtype."""
    return dataclasses.replace(deepseek_v3(scale), wgrad=None)


def bf16() -> Recipe:
    """Nothing in FP8: the other arm of a comparison."""
    return Recipe(fprop=None, dgrad=None, wgrad=None)


def _tiles(scale: numerics.ScaleKind) -> tuple[QuantSpec, QuantSpec]:
    """1x128 for activations and gradients, 128x128 for weights."""
    return (
        dataclasses.replace(TILE_1X128, scale=scale),
        dataclasses.replace(BLOCK_128X128, scale=scale),
    )


PRESETS = {f.__name__: f for f in (deepseek_v3, blocked_wgrad, bf16_wgrad, bf16)}


def check_recipe(caller: str, recipe: Any) -> None:
    """Raises ValueError, on behalf of `caller`, for what is no `Recipe`."""
    if not isinstance(recipe, Recipe):
        presets = ", ".join(f"recipes.{name}()" for name in PRESETS)
        raise ValueError(
            f"{caller} takes a Recipe or None, got recipe={described(recipe)}; presets "
            f"are {presets}."
        )


def recipe_or_default(caller: str, recipe: Recipe | None) -> Recipe:
    """The recipe; for None, which everywhere is "no word on it", the default.

    Functions and layers are called for products in FP8: theirs is `deepseek_v3()`.
    A `Rule`, which is about what differs, has one of its own, `bf16()`.

    Raises:
        ValueError: On behalf of `caller`, for what is no `Recipe`.
    """
    if recipe is None:
        return deepseek_v3()
    check_recipe(caller, recipe)
    return recipe
