"""`flax.nnx.Linear` with an FP8 product: the layer is Flax's, the product is ours.

Invariant: parameters, their names, shapes, dtypes, initial values and metadata are
those of `flax.nnx.Linear`, because its code makes them.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fp8jax.ops import dot_general as fp8_dot_general
from fp8jax.recipes import Recipe


class Linear(nnx.Linear):
    """A linear map over the last dimension, `y = x @ kernel + bias`, in FP8.

    A drop-in for `flax.nnx.Linear`: the same arguments, the same state (`kernel`
    [in_features, out_features] and `bias` [out_features] in `param_dtype`), so a
    checkpoint of one loads into the other. `x` [..., in_features] gives `y`
    [..., out_features] in `dtype`, or in the common dtype of `x` and the parameters.
    Only the three matrix products (fprop, dgrad, wgrad) are in FP8; the bias is added
    in the output's dtype.

    Args:
        in_features: Size of the contracted dimension.
        out_features: Size of the dimension that replaces it.
        dot_general: A product of your own in place of the FP8 one, as in Flax. It
            excludes `recipe` and `implementation`. Flax's default, the unquantized
            `jax.lax.dot_general`, is one too.
        rngs: Keys for the initializers.
        recipe: How the three products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`. May be reassigned later.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
        **options: Every other argument of `flax.nnx.Linear`, with its default there.

    Raises:
        ValueError: If `dot_general` comes together with `recipe` or `implementation`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dot_general: Callable[..., jax.Array] | None = None,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
        **options: Any,
    ):
        if dot_general is not None:
            if recipe is not None or implementation is not None:
                raise ValueError(
                    "fp8jax.nnx.Linear takes recipe= and implementation= for its own "
                    "FP8 product, or a product of yours as dot_general=, got both: "
                    f"{recipe=}, {implementation=}, {dot_general=}."
                )
            options["dot_general"] = dot_general
        super().__init__(in_features, out_features, rngs=rngs, **options)
        if dot_general is None:
            # Flax has just stored its default, which would hide the method below.
            del self.dot_general
        self.recipe = recipe
        self.implementation = implementation

    def dot_general(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns `fp8jax.dot_general(...)` under this layer's recipe."""
        return fp8_dot_general(
            *args, recipe=self.recipe, implementation=self.implementation, **kwargs
        )
