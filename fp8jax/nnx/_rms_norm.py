"""RMS normalization and a dense layer in FP8, without the array between them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from fp8jax import ops
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe

_KERNEL_INIT = nnx.initializers.lecun_normal()  # nnx.Linear's default.


class RMSNormLinear(nnx.Module):
    """`linear(norm(x))`, without a bias, quantized as it is normalized.

    The state is that of a `flax.nnx.RMSNorm` called `norm` and a `flax.nnx.Linear(
    use_bias=False)` called `linear`: a checkpoint of a block written with those loads
    into this one. `fp8jax.ops.rms_norm_dot` says what is fused, and when it is not; it
    takes several kernels, too.

    For inference `linear.kernel` may be a QTensor [in_features, out_features], as in
    `fp8jax.nnx.Linear`: what is normalized is quantized online, the weight never
    inflated; the output is in `dtype`, or that of the input. Such a kernel has no
    gradient.

    Args:
        in_features: Size of the last dimension that comes in.
        out_features: Size of the one that goes out.
        epsilon: As in `flax.nnx.RMSNorm`.
        dtype, param_dtype, kernel_init: As in `flax.nnx.Linear`, of both.
        rngs: Keys for the initializers.
        recipe: How the three products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`. May be reassigned later.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
    ):
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nnx.RMSNorm(in_features, epsilon=epsilon, **how)
        self.linear = nnx.Linear(
            in_features, out_features, use_bias=False, kernel_init=kernel_init, **how
        )
        self.epsilon = epsilon
        self.dtype = dtype
        self.recipe = recipe
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` to `[..., out_features]`, in `dtype` or theirs."""
        assert self.norm.scale is not None
        scale = self.norm.scale[...]
        kernel: Any = self.linear.kernel.get_value()
        how: Any = {
            "epsilon": self.epsilon,
            "recipe": self.recipe,
            "implementation": self.implementation,
        }
        if isinstance(kernel, QTensor) or isinstance(x, QTensor):
            dtype = x.dtype if self.dtype is None else self.dtype
            x = x if isinstance(x, QTensor) else x.astype(dtype)
            (y,) = ops.static_weight_rms_norm(
                "fp8jax.nnx.RMSNormLinear", x, scale, kernel, out_dtype=dtype, **how
            )
            return y
        x, kernel = promote_dtype((x, kernel), dtype=self.dtype)
        (y,) = ops.rms_norm_dot(x, scale, kernel, **how)
        return y
