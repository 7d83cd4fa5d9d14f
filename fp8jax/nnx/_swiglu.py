"""A gated MLP in FP8 whose activation is quantized as it is computed."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from fp8jax import ops
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe

_KERNEL_INIT = nnx.initializers.lecun_normal()  # nnx.Linear's default.


class SwiGLU(nnx.Module):
    """A gated MLP, `down(silu(gate(x)) * up(x))`, without biases, in FP8.

    The state is that of three `flax.nnx.Linear(use_bias=False)` called `gate`, `up` and
    `down`: a checkpoint of a block written with those loads into this one.
    `fp8jax.ops.swiglu_mlp` says what is fused, and when it is not.

    For inference all three kernels may be QTensors, as `Linear`'s may; so may x then,
    if `dtype` is given.

    Args:
        features: Size of the last dimension, in and out.
        hidden_features: Size of what lies between.
        dtype, param_dtype, kernel_init: As in `flax.nnx.Linear`, of all three.
        rngs: Keys for the initializers.
        recipe: How all nine products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`. May be reassigned later.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
    ):
        def linear(k: int, n: int) -> nnx.Linear:
            return nnx.Linear(
                k,
                n,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.gate = linear(features, hidden_features)
        self.up = linear(features, hidden_features)
        self.down = linear(hidden_features, features)
        self.dtype = dtype
        self.recipe = recipe
        self.implementation = implementation

    def __call__(self, x: jax.Array | QTensor) -> jax.Array:
        """`[..., features]` to the same, in `dtype` or the common dtype of all."""
        layers = self.gate, self.up, self.down
        kernels: list[Any] = [layer.kernel.get_value() for layer in layers]
        name = "fp8jax.nnx.SwiGLU"
        how = {"recipe": self.recipe, "implementation": self.implementation}
        ops.check_quantized_input(name, x, self.dtype, *kernels)
        if any(isinstance(w, QTensor) for w in kernels):
            dtype = x.dtype if self.dtype is None else self.dtype
            x = x if isinstance(x, QTensor) else x.astype(dtype)
            return ops.static_weight_swiglu(name, x, *kernels, out_dtype=dtype, **how)
        arrays: Any = promote_dtype((x, *kernels), dtype=self.dtype)
        return ops.swiglu_mlp(*arrays, **how)
