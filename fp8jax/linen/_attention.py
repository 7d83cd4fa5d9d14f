"""Flax Linen's multi-head attention with its four projections in FP8."""

import flax.linen as nn

from fp8jax import ops
from fp8jax.recipes import Recipe


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """Multi-head attention, its query, key, value and output projections in FP8.

    A drop-in for `flax.linen.MultiHeadDotProductAttention`, whose code makes the
    parameters and runs the attention itself, unquantized as DeepSeek-V3 keeps it.

    Attributes:
        recipe: How the projections' products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
        qkv_dot_general, qkv_dot_general_cls, out_dot_general, out_dot_general_cls: A
            product of your own, or a factory of one, in place of the FP8 one.

    Raises:
        ValueError: If `recipe` or `implementation` is given, but both products are
            your own.
    """

    recipe: Recipe | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        filled = ops.attention_products(
            f"fp8jax.linen.{type(self).__name__}",
            self.recipe,
            self.implementation,
            vars(self),
        )
        for slot, product in filled.items():
            setattr(self, slot, product)
        super().__post_init__()


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` by the other name that Flax gives it.

    Flax names a layer's parameters by its class, so the two are not the same to a
    checkpoint.
    """
