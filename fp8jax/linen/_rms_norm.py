"""RMS normalization and a dense layer in FP8, without the array between them."""

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


class RMSNormDense(nn.Module):
    """`dense(norm(x))`, without a bias, quantized as it is normalized.

    The parameters are those of a `flax.linen.RMSNorm` called `norm` and a
    `flax.linen.Dense(use_bias=False)` called `dense`: a checkpoint of a block written
    with those loads into this one. `fp8jax.ops.rms_norm_dot` says what is fused, and
    when it is not; it takes several kernels, too.

    For inference `dense/kernel` may be a QTensor [k, features], as in
    `fp8jax.linen.Dense`: what is normalized is quantized online, the weight never
    inflated; the output is in `dtype`, or that of the input. Such a kernel has no
    gradient.

    Attributes:
        features: Size of the last dimension that goes out.
        epsilon: As in `flax.linen.RMSNorm`.
        dtype, param_dtype, kernel_init: As in `flax.linen.Dense`, of both.
        recipe: How the three products are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.dot_general`; None picks one.
    """

    features: int
    epsilon: float = 1e-6
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = _KERNEL_INIT
    recipe: Recipe | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., k]` to `[..., features]`, in `dtype` or the common dtype of all."""
        side = x.shape[-1:]
        ones = nn.initializers.ones_init()
        norm: Any = Parameter("scale", side, self.param_dtype, ones, name="norm")
        dense: Any = Parameter(
            "kernel",
            (*side, self.features),
            self.param_dtype,
            self.kernel_init,
            name="dense",
        )
        scale, kernel = norm(), dense()
        how: Any = {
            "epsilon": self.epsilon,
            "recipe": self.recipe,
            "implementation": self.implementation,
        }
        if isinstance(kernel, QTensor) or isinstance(x, QTensor):
            dtype = x.dtype if self.dtype is None else self.dtype
            x = x if isinstance(x, QTensor) else x.astype(dtype)
            (y,) = ops.static_weight_rms_norm(
                "fp8jax.linen.RMSNormDense", x, scale, kernel, out_dtype=dtype, **how
            )
            return y
        arrays: Any = promote_dtype(x, kernel, dtype=self.dtype)
        (y,) = ops.rms_norm_dot(arrays[0], scale, arrays[1], **how)
        return y
