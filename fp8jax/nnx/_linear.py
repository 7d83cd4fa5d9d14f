"""`flax.nnx.Linear` with an FP8 product: the layer is Flax's, the product is ours.

Invariant: parameters, their names, shapes, dtypes, initial values and metadata are
those of `flax.nnx.Linear`, because its code makes them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax.ops import dot_general as fp8_dot_general
from fp8jax.ops import static_weight_dot
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe


class Linear(nnx.Linear):
    """A linear map over the last dimension, `y = x @ kernel + bias`, in FP8.

    A drop-in for `flax.nnx.Linear`: the same arguments, the same state (`kernel`
    [in_features, out_features] and `bias` [out_features] in `param_dtype`), so a
    checkpoint of one loads into the other. `x` [..., in_features] gives `y`
    [..., out_features] in `dtype`, or in the common dtype of `x` and the parameters.
    Only the three matrix products (fprop, dgrad, wgrad) are in FP8; the bias is added
    in the output's dtype.

    For inference the kernel may be a QTensor [in_features, out_features], as
    `fp8jax.checkpoint.load(..., layout="flax")` gives it: `nnx.update(layer, {"kernel":
    q})`. The activation is quantized online and the weight never inflated; the layer
    has no gradient then.

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
        ValueError: If `dot_general` comes together with `recipe` or `implementation`,
            or with a QTensor as the kernel.
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

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to `inputs` [..., in_features]."""
        kernel = self.kernel.get_value()
        if not isinstance(kernel, QTensor):
            return super().__call__(inputs, out_sharding)
        name = "fp8jax.nnx.Linear"
        if "dot_general" in vars(self) or out_sharding is not None:
            raise ValueError(
                f"{name} with a QTensor kernel takes no dot_general= of yours and no "
                f"out_sharding, got {vars(self).get('dot_general')} and {out_sharding}."
            )
        bias = None if self.bias is None else self.bias[...]
        inputs, bias = self.promote_dtype((inputs, bias), dtype=self.dtype)
        y = static_weight_dot(
            name,
            inputs,
            kernel,
            out_dtype=self.preferred_element_type or inputs.dtype,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
