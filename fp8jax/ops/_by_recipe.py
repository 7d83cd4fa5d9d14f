"""What Flax's layers share: a product with its recipe bound, for Flax's slots."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fp8jax.ops._dot_general import dot_general
from fp8jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class ByRecipe:
    """`product(..., recipe=recipe, implementation=implementation)`, as a value.

    Equal by value, which `functools.partial` is not: two equal layers must compare
    equal, since a layer is often a static argument of `jax.jit`.

    Attributes:
        product: `dot_general` or `einsum`.
        recipe: its recipe; None is `fp8jax.recipes.deepseek_v3()`.
        implementation: kernel to use, as in `fp8jax.dot_general`.
    """

    product: Callable[..., jax.Array]
    recipe: Recipe | None
    implementation: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self.product(
            *args, recipe=self.recipe, implementation=self.implementation, **kwargs
        )


def takes_own_product(
    name: str, recipe: Recipe | None, implementation: str | None, **own: Any
) -> bool:
    """Whether a layer's user put a product of theirs in the place of the FP8 one.

    Args:
        name: of the layer, for the error.
        recipe, implementation: as the layer was given them.
        **own: Flax's slots for the product, None where they are empty.

    Raises:
        ValueError: If they gave a recipe or an implementation as well.
    """
    if all(product is None for product in own.values()):
        return False
    if recipe is not None or implementation is not None:
        slots = " or ".join(f"{slot}=" for slot in own)
        came = ", ".join(f"{slot}={product!r}" for slot, product in own.items())
        raise ValueError(
            f"{name} takes recipe= and implementation= for its own FP8 product, or a "
            f"product of yours as {slots}, got both: {recipe=}, {implementation=}, "
            f"{came}."
        )
    return True


def attention_products(
    name: str,
    recipe: Recipe | None,
    implementation: str | None,
    slots: Mapping[str, Any],
) -> dict[str, ByRecipe]:
    """FP8 products for those of an attention layer's slots that are the recipe's.

    Args:
        name: of the layer, for the error.
        recipe, implementation: as the layer was given them.
        slots: of Flax's layer, by name: `qkv_dot_general`, `out_dot_general` and the
            two with `_cls`; a missing one is empty. Others are not looked at.

    Returns:
        What to put into `qkv_dot_general` and `out_dot_general`, where a user has not
        put anything into that slot or the one with `_cls`.

    Raises:
        ValueError: If nothing is left for a recipe or an implementation to be about.
    """
    own, free = {}, []
    for side in ("qkv_dot_general", "out_dot_general"):
        for slot in (side, f"{side}_cls"):
            own[slot] = slots.get(slot)
        # A layer that is copied hands back what was put there for its old recipe.
        if isinstance(own[side], ByRecipe):
            own[side] = None
        if own[side] is None and own[f"{side}_cls"] is None:
            free.append(side)
    if not free:
        takes_own_product(name, recipe, implementation, **own)
    product = ByRecipe(dot_general, recipe, implementation)
    return dict.fromkeys(free, product)
