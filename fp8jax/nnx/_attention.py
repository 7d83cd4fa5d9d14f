"""`flax.nnx.MultiHeadAttention` with its four projections in FP8."""

from typing import Any

from flax import nnx

from fp8jax import ops
from fp8jax.recipes import Recipe


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Multi-head attention, its query, key, value and output projections in FP8.

    A drop-in for `flax.nnx.MultiHeadAttention`, whose code makes the parameters and
    runs the attention itself, unquantized as DeepSeek-V3 keeps it.

    Args:
        *args: Positional arguments of `flax.nnx.MultiHeadAttention`.
        recipe: How the projections' products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
        **options: Every other argument of `flax.nnx.MultiHeadAttention`, with its
            default there. `qkv_dot_general` (or `_cls`) and `out_dot_general` (or
            `_cls`) put a product of your own in the place of the FP8 one.

    Raises:
        ValueError: If `recipe` or `implementation` is given, but both products are
            your own.
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe | None = None,
        implementation: str | None = None,
        **options: Any,
    ):
        slots = ops.attention_products(
            "fp8jax.nnx.MultiHeadAttention", recipe, implementation, options
        )
        super().__init__(*args, **options | slots)
