"""Flax Linen's dense layers with an FP8 product: the layer is Flax's, the product ours.

Invariant: parameters, their names, shapes, dtypes, initial values and partitioning
metadata are those of Flax's layer, because its code makes them.
"""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fp8jax import ops
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe


def _fill_slot(layer: Any) -> None:
    """Puts the FP8 product into Flax's slot, unless the user's own is there."""
    # `clone` hands back the product set below: rebuild it, as `recipe` may differ.
    if isinstance(layer.dot_general, ops.ByRecipe):
        layer.dot_general = None
    recipe, implementation = layer.recipe, layer.implementation
    if not ops.takes_own_product(
        f"fp8jax.linen.{type(layer).__name__}",
        recipe,
        implementation,
        dot_general=layer.dot_general,
        dot_general_cls=layer.dot_general_cls,
    ):
        layer.dot_general = ops.ByRecipe(ops.dot_general, recipe, implementation)


# As Flax wrote it: what Linen makes of a method is a call of its own in summaries.
_CALL = inspect.unwrap(nn.Dense.__call__)


class Dense(nn.Dense):
    """A linear map over the last dimension, `y = x @ kernel + bias`, in FP8.

    A drop-in for `flax.linen.Dense`: the same arguments in the same order, the same
    parameter tree (`kernel` [in, features] and `bias` [features] in `param_dtype`), so
    a checkpoint of one loads into the other. `x` [..., in] gives `y` [..., features] in
    `dtype`, or in the common dtype of `x` and the parameters. Only the three matrix
    products (fprop, dgrad, wgrad) are in FP8; the bias is added in the output's dtype.

    For inference, or as a frozen base, the parameter `kernel` may be a QTensor [in,
    features], as `fp8jax.checkpoint.load(..., layout="flax")` gives it. The activation
    is quantized online and the weight never inflated, in the gradient of the input
    neither; the kernel has none. Inputs may be a QTensor [..., in] in tiles of (1,
    128), made once for several layers or by a fused quantization; `y` is then in
    `dtype`, which must be given.

    Attributes:
        recipe: How the three products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
        dot_general: A product of your own in place of the FP8 one, as in Flax. It
            excludes `recipe` and `implementation`.
        dot_general_cls: A factory of such a product, likewise.

    Raises:
        ValueError: If `dot_general` or `dot_general_cls` comes together with `recipe`
            or `implementation`, or with a QTensor as the kernel; if the inputs are a
            QTensor but the kernel is none, or `dtype` is not given.
    """

    recipe: Recipe | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        _fill_slot(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array | QTensor) -> jax.Array:
        """Applies the layer to `inputs` [..., in]."""
        name = "fp8jax.linen.Dense"
        kernel = self.get_variable("params", "kernel")
        ops.check_quantized_input(name, inputs, self.dtype, kernel)
        if not isinstance(kernel, QTensor):
            assert not isinstance(inputs, QTensor)
            return _CALL(self, inputs)
        if not isinstance(self.dot_general, ops.ByRecipe):
            raise ValueError(
                f"{name} with a QTensor kernel takes no product of yours, got "
                f"{self.dot_general=}, {self.dot_general_cls=}."
            )
        if kernel.shape[-1:] != (self.features,):
            raise ValueError(
                f"{name} with features={self.features} got a QTensor kernel of shape "
                f"{kernel.shape}."
            )
        bias = self.get_variable("params", "bias") if self.use_bias else None
        x: Any = None if isinstance(inputs, QTensor) else inputs
        x, bias = self.promote_dtype(x, bias, dtype=self.dtype)
        x = inputs if x is None else x
        dtype: Any = self.dtype if isinstance(x, QTensor) else x.dtype
        y = ops.static_weight_dot(
            name,
            x,
            kernel,
            out_dtype=dtype,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class DenseGeneral(nn.DenseGeneral):
    """A linear map over any dimensions, to any number of them, in FP8.

    A drop-in for `flax.linen.DenseGeneral`, as `Dense` is for Flax's: `kernel`
    [*batch, *in, *features] and `bias` [*batch, *features]. The contracted dimensions
    are one contraction, in tiles of 128 of all of them together.

    Attributes:
        recipe, implementation, dot_general, dot_general_cls: As in `Dense`.

    Raises:
        ValueError: As `Dense` does.
    """

    recipe: Recipe | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        _fill_slot(self)
        super().__post_init__()
