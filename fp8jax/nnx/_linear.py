"""Flax NNX's linear layers with an FP8 product: the layer is Flax's, the product ours.

Invariant: parameters, their names, shapes, dtypes, initial values and metadata are
those of Flax's layer, because its code makes them. Products are methods in the place
of Flax's attributes, so that a recipe that is reassigned counts from the next call.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax import ops
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe


class _Product:
    """Binds a layer's product as a method, without being a function of its class.

    `nnx.tabulate` adds a row for every public function of a module's class.
    """

    def __init__(self, method: Callable[..., jax.Array]):
        self.__doc__ = method.__doc__
        self._method = method

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        return self if layer is None else types.MethodType(self._method, layer)


class Linear(nnx.Linear):
    """A linear map over the last dimension, `y = x @ kernel + bias`, in FP8.

    A drop-in for `flax.nnx.Linear`: the same arguments, the same state (`kernel`
    [in_features, out_features] and `bias` [out_features] in `param_dtype`), so a
    checkpoint of one loads into the other. `x` [..., in_features] gives `y`
    [..., out_features] in `dtype`, or in the common dtype of `x` and the parameters.
    Only the three matrix products (fprop, dgrad, wgrad) are in FP8; the bias is added
    in the output's dtype.

    For inference, or as a frozen base, the kernel may be a QTensor [in_features,
    out_features], as `fp8jax.checkpoint.load(..., layout="flax")` gives it:
    `nnx.update(layer, {"kernel": q})`. The activation is quantized online and the
    weight never inflated, in the gradient of the input neither; the kernel has none.
    Inputs may be a QTensor [..., in_features] in tiles of (1, 128), made once for
    several layers or by a fused quantization; `y` is then in `dtype`, which must be
    given.

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
            or with a QTensor as the kernel; if the inputs are a QTensor but the kernel
            is none, or `dtype` is not given.
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
        own = ops.takes_own_product(
            "fp8jax.nnx.Linear", recipe, implementation, dot_general=dot_general
        )
        if own:
            options["dot_general"] = dot_general
        super().__init__(in_features, out_features, rngs=rngs, **options)
        if not own:
            # Flax has just stored its default, which would hide the method below.
            del self.dot_general
        self.recipe = recipe
        self.implementation = implementation

    @_Product
    def dot_general(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns `fp8jax.dot_general(...)` under this layer's recipe."""
        return ops.dot_general(
            *args, recipe=self.recipe, implementation=self.implementation, **kwargs
        )

    def __call__(
        self, inputs: jax.Array | QTensor, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer to `inputs` [..., in_features]."""
        name = "fp8jax.nnx.Linear"
        kernel = self.kernel.get_value()
        ops.check_quantized_input(name, inputs, self.dtype, kernel)
        if not isinstance(kernel, QTensor):
            assert not isinstance(inputs, QTensor)
            return super().__call__(inputs, out_sharding)
        if "dot_general" in vars(self) or out_sharding is not None:
            raise ValueError(
                f"{name} with a QTensor kernel takes no dot_general= of yours and no "
                f"out_sharding, got {vars(self).get('dot_general')} and {out_sharding}."
            )
        bias = None if self.bias is None else self.bias[...]
        x: Any = None if isinstance(inputs, QTensor) else inputs
        x, bias = self.promote_dtype((x, bias), dtype=self.dtype)
        x = inputs if x is None else x
        dtype: Any = self.dtype if isinstance(x, QTensor) else x.dtype
        y = ops.static_weight_dot(
            name,
            x,
            kernel,
            out_dtype=self.preferred_element_type or dtype,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


class LinearGeneral(nnx.LinearGeneral):
    """A linear map over any dimensions, to any number of them, in FP8.

    A drop-in for `flax.nnx.LinearGeneral`, as `Linear` is for Flax's: `kernel`
    [*batch, *in_features, *out_features], `bias` [*batch, *out_features]. The
    contracted dimensions are one contraction, in tiles of 128 of all of them together.

    Args:
        in_features: Sizes of the contracted dimensions.
        out_features: Sizes of the dimensions that replace them.
        dot_general: A product of your own in place of the FP8 one, as in Flax. It
            excludes `recipe` and `implementation`.
        dot_general_cls: A factory of such a product, likewise.
        rngs: Keys for the initializers.
        recipe, implementation: As in `Linear`.
        **options: Every other argument of `flax.nnx.LinearGeneral`, with its default.

    Raises:
        ValueError: If `dot_general` or `dot_general_cls` comes together with `recipe`
            or `implementation`.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        dot_general: Callable[..., jax.Array] | None = None,
        dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
        **options: Any,
    ):
        slots = {"dot_general": dot_general, "dot_general_cls": dot_general_cls}
        own = ops.takes_own_product(
            "fp8jax.nnx.LinearGeneral", recipe, implementation, **slots
        )
        super().__init__(in_features, out_features, rngs=rngs, **slots, **options)
        if not own:
            del self.dot_general  # As in Linear.
        self.recipe = recipe
        self.implementation = implementation

    dot_general = Linear.dot_general


class Einsum(nnx.Einsum):
    """An einsum of the input and a kernel, in FP8.

    A drop-in for `flax.nnx.Einsum`, as `Linear` is for Flax's. In `fp8jax.ops.einsum`
    the kernel is quantized as the weight however the equation orders its result.

    Args:
        einsum_str: Equation of the input and the kernel, "nta,hab->nthb".
        kernel_shape: Shape of the kernel.
        bias_shape: Shape of the bias; None for no bias.
        einsum_op: A product of your own in place of the FP8 one, as in Flax. It
            excludes `recipe` and `implementation`. Flax's default, the unquantized
            `jax.numpy.einsum`, is one too.
        rngs: Keys for the initializers.
        recipe, implementation: As in `Linear`.
        **options: Every other argument of `flax.nnx.Einsum`, with its default there.

    Raises:
        ValueError: If `einsum_op` comes together with `recipe` or `implementation`.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        einsum_op: Callable[..., jax.Array] | None = None,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
        **options: Any,
    ):
        own = ops.takes_own_product(
            "fp8jax.nnx.Einsum", recipe, implementation, einsum_op=einsum_op
        )
        if own:
            options["einsum_op"] = einsum_op
        super().__init__(einsum_str, kernel_shape, bias_shape, rngs=rngs, **options)
        if not own:
            del self.einsum_op  # As in Linear.
        self.recipe = recipe
        self.implementation = implementation

    @_Product
    def einsum_op(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns `fp8jax.ops.einsum(...)` under this layer's recipe."""
        return ops.einsum(
            *args, recipe=self.recipe, implementation=self.implementation, **kwargs
        )
