"""DeepSeek-V3's mixture of experts, its products in FP8."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from fp8jax import ops
from fp8jax.linen._parameter import Parameter
from fp8jax.linen._swiglu import SwiGLU
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe

_KERNEL_INIT = nn.initializers.lecun_normal()  # nn.Dense's default.
# The same for each of several kernels.
_EXPERTS_INIT = nn.initializers.lecun_normal(batch_axis=(0,))


class MoE(nn.Module):
    """A mixture of gated MLPs, `shared(x) + sum of weight * expert(x)`, in FP8.

    Each token goes to the `top_k` experts that DeepSeek-V3's routing chooses, and none
    is dropped: `fp8jax.ops.route` says how. The router is in float32. Experts are those
    of `fp8jax.ops.expert_mlp`, the shared one is a `SwiGLU`.

    Variables, besides the `SwiGLU`'s under "shared", if there are shared experts:

        params/router/kernel  float32 [features, num_experts]
        params/experts/gate/kernel, .../up/kernel
                              [num_experts, features, hidden_features]
        params/experts/down/kernel  [num_experts, hidden_features, features]
        router/router/bias    float32 [num_experts]: see `balance`
        router/router/load    int32 [num_experts]: tokens of each in the last call that
                              had the collection "router" mutable

    For inference, or as a frozen base, the experts' kernels may be QTensors, in tiles
    of 128x128, and so may the shared experts': their codes are what is multiplied, in
    the gradient of the input, too, and have none. `y` is then in `dtype`, or that of
    `x`.

    Attributes:
        hidden_features: Size of what lies between in one expert; in and out are as wide
            as x.
        num_experts: Experts that are routed to.
        top_k: Experts a token.
        num_groups, top_groups, scale, normalize: As in `fp8jax.ops.route`.
        num_shared: Experts that every token goes to; they are one MLP that is
            `num_shared * hidden_features` wide.
        dtype, param_dtype: As in `flax.linen.Dense`, of all but the router.
        kernel_init: Of the experts' kernels, called with `[num_experts, k, n]`.
        router_init: Of the router's kernel.
        shared_init: Of the shared experts' kernels.
        recipe: How all products but the router's are quantized; None is
            `fp8jax.recipes.deepseek_v3()`.
        implementation: Kernel to use, as in `fp8jax.ragged_dot`; None picks one.

    Raises:
        ValueError: If the routing's counts do not fit each other.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2.
    """

    hidden_features: int
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    normalize: bool = True
    num_shared: int = 0
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = _EXPERTS_INIT
    router_init: nn.initializers.Initializer = _KERNEL_INIT
    shared_init: nn.initializers.Initializer = _KERNEL_INIT
    recipe: Recipe | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., features]` to the same, in `dtype` or the common dtype of all."""
        features, experts = x.shape[-1], self.num_experts
        how: Any = {"recipe": self.recipe, "implementation": self.implementation}
        name = "fp8jax.linen.MoE"
        ops.check_routing(name, experts, self.top_k, self.num_groups, self.top_groups)
        router = _Router(features, experts, self.router_init, name="router")
        kernels = _Experts(
            (experts, features, self.hidden_features),
            self.param_dtype,
            self.kernel_init,
            name="experts",
        )
        weights: Any = kernels()
        if any(isinstance(w, QTensor) for w in weights):
            x = x if self.dtype is None else x.astype(self.dtype)
        else:
            arrays: Any = promote_dtype(x, *weights, dtype=self.dtype)
            x, *weights = arrays
        y, load = ops.moe(
            x,
            *router(),
            *weights,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            scale=self.scale,
            normalize=self.normalize,
            **how,
        )
        router.keep(load)
        if not self.num_shared:
            return y
        shared = SwiGLU(
            self.num_shared * self.hidden_features,
            self.dtype,
            self.param_dtype,
            self.shared_init,
            **how,
            name="shared",
        )
        return y + shared(x)


class _Experts(nn.Module):
    shape: tuple[int, int, int]  # Of gate and up.
    param_dtype: jax.typing.DTypeLike
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> list[jax.Array | QTensor]:
        experts, features, hidden = self.shape
        sides = {
            "gate": (features, hidden),
            "up": (features, hidden),
            "down": (hidden, features),
        }
        kernels = []
        for name, side in sides.items():
            shape = (experts, *side)
            layer: Any = Parameter(
                "kernel", shape, self.param_dtype, self.kernel_init, name=name
            )
            kernels.append(layer())
        return kernels


class _Router(nn.Module):
    features: int
    experts: int
    kernel_init: nn.initializers.Initializer

    def setup(self) -> None:
        shape = (self.features, self.experts)
        self.kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        zeros = jnp.zeros
        self.bias = self.variable("router", "bias", zeros, self.experts, jnp.float32)
        self.load = self.variable("router", "load", zeros, self.experts, jnp.int32)

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        return self.kernel, self.bias.value

    def keep(self, load: jax.Array) -> None:
        if self.is_mutable_collection("router") and not self.is_initializing():
            self.load.value = load


def balance(collection: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The collection "router" with every bias moved against its `MoE`'s last load.

    To be called once after each step of training, inside of `jax.jit` or out of it.
    `fp8jax.ops.balanced_bias` has the equation.

    Args:
        collection: of a model with `MoE` layers at any depth, stacked by `nn.scan` or
            not.
        rate: how far a bias moves; 0.001 in DeepSeek-V3.
    """
    if "bias" in collection and "load" in collection:
        bias = ops.balanced_bias(collection["bias"], collection["load"], rate)
        return {**collection, "bias": bias}
    return {name: balance(inner, rate) for name, inner in collection.items()}
