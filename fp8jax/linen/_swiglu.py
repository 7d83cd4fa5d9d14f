"""A gated MLP in FP8 whose activation is quantized as it is computed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from fp8jax import ops
from fp8jax.linen._parameter import Parameter
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe

_KERNEL_INIT = nn.initializers.lecun_normal()  # nn.Dense's default.


class SwiGLU(nn.Module):
    """A gated MLP, `down(silu(gate(x)) * up(x))`, without biases, in FP8.

    The parameters are those of three `flax.linen.Dense(use_bias=False)` called `gate`,
    `up` and `down`: a checkpoint of a block written with those loads into this one.
    `fp8jax.ops.swiglu_mlp` says what is fused, and when it is not.

    For inference all three kernels may be QTensors, as `Dense`'s may; so may x then, if
    `dtype` is given.

    Attributes:
        hidden_features: Size of what lies between; in and out are as wide as x.
        dtype, param_dtype, kernel_init: As in `flax.linen.Dense`, of all three.
        recipe: How all nine products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
    """

    hidden_features: int
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = _KERNEL_INIT
    recipe: Recipe | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array | QTensor) -> jax.Array:
        """`[..., features]` to the same, in `dtype` or the common dtype of all."""
        features = x.shape[-1]

        def kernel(name: str, k: int, n: int) -> Any:
            layer: Any = Parameter(
                "kernel", (k, n), self.param_dtype, self.kernel_init, name=name
            )
            return layer()

        kernels = (
            kernel("gate", features, self.hidden_features),
            kernel("up", features, self.hidden_features),
            kernel("down", self.hidden_features, features),
        )
        name = "fp8jax.linen.SwiGLU"
        how = {"recipe": self.recipe, "implementation": self.implementation}
        ops.check_quantized_input(name, x, self.dtype, *kernels)
        if any(isinstance(w, QTensor) for w in kernels):
            dtype = x.dtype if self.dtype is None else self.dtype
            x = x if isinstance(x, QTensor) else x.astype(dtype)
            return ops.static_weight_swiglu(name, x, *kernels, out_dtype=dtype, **how)
        arrays: Any = promote_dtype(x, *kernels, dtype=self.dtype)
        return ops.swiglu_mlp(*arrays, **how)
