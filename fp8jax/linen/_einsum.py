"""`flax.linen.Einsum` with an FP8 product."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import merge_param

from fp8jax import ops
from fp8jax.recipes import Recipe


class Einsum(nn.Einsum):
    """An einsum of the input and a kernel, in FP8.

    A drop-in for `flax.linen.Einsum`, as `Dense` is for Flax's. In `fp8jax.ops.einsum`
    the kernel is quantized as the weight however the equation orders its result.

    Attributes:
        recipe: How the three products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
    """

    recipe: Recipe | None = None
    implementation: str | None = None

    # Flax's has no slot for the product, so this is its `__call__` but for that line.
    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """Applies the equation given here or to the constructor.

        Args:
            inputs: The first operand.
            einsum_str: Equation of the input and the kernel, with "->".

        Returns:
            What the equation gives, in `preferred_element_type`, `dtype`, or the
            common dtype of input and parameters.

        Raises:
            ValueError: If there is no equation, or none of two operands and a result.
        """
        equation = merge_param("einsum_str", self.einsum_str, einsum_str)
        equation = equation.replace(" ", "")
        # In Flax's words, which its users' tests look for.
        if "->" not in equation:
            raise ValueError('`einsum_str` equation must be explicit and include "->".')
        if equation.count(",") != 1:
            raise ValueError(
                "`einsum_str` equation must have exactly two operands and therefore, "
                f"exactly one comma character, instead of {equation.count(',')}"
            )
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias, broadcast_shape = None, None
        if self.use_bias:
            shape, broadcast_shape = self._get_bias_shape(equation, inputs, kernel)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        x, w, bias = promoted
        y = ops.einsum(
            equation,
            x,
            w,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return y if bias is None else y + jnp.reshape(bias, broadcast_shape)
