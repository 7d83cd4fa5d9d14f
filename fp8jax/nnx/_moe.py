"""DeepSeek-V3's mixture of experts, its products in FP8."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from fp8jax import ops
from fp8jax.nnx._swiglu import SwiGLU
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe

_KERNEL_INIT = nnx.initializers.lecun_normal()  # nnx.Linear's default.
# The same for each of several kernels.
_EXPERTS_INIT = nnx.initializers.lecun_normal(batch_axis=(0,))


class RouterBias(nnx.Variable):
    """Added to the experts' scores when some are chosen; gradients do not train it."""


class ExpertLoad(nnx.Variable):
    """How many tokens each expert got in the last call."""


class MoE(nnx.Module):
    """A mixture of gated MLPs, `shared(x) + sum of weight * expert(x)`, in FP8.

    Each token goes to the `top_k` experts that DeepSeek-V3's routing chooses, and none
    is dropped: `fp8jax.ops.route` says how. The router is in float32. Experts are those
    of `fp8jax.ops.expert_mlp`, the shared one is a `SwiGLU`.

    State, with "kernel" an `nnx.Param`:

        router.kernel  float32 [features, num_experts]
        router.bias    RouterBias, float32 [num_experts]: see `balance`
        router.load    ExpertLoad, int32 [num_experts], written by each call
        experts.gate.kernel, experts.up.kernel  [num_experts, features, hidden_features]
        experts.down.kernel  [num_experts, hidden_features, features]
        shared.gate.kernel, ...  of the `SwiGLU`, if there are shared experts

    For inference, or as a frozen base, the experts' kernels may be QTensors, in tiles
    of 128x128, and so may the shared experts': their codes are what is multiplied, in
    the gradient of the input, too, and have none. `y` is then in `dtype`, or that of
    `x`.

    Args:
        features: Size of the last dimension, in and out.
        hidden_features: Size of what lies between in one expert.
        num_experts: Experts that are routed to.
        top_k: Experts a token.
        num_groups, top_groups, scale, normalize: As in `fp8jax.ops.route`.
        num_shared: Experts that every token goes to; they are one MLP that is
            `num_shared * hidden_features` wide.
        dtype, param_dtype: As in `flax.nnx.Linear`, of all but the router.
        kernel_init: Of the experts' kernels, called with `[num_experts, k, n]`.
        kernel_metadata: Of the experts' kernels, such as their sharding, for
            `nnx.Param`.
        router_init: Of the router's kernel.
        shared_init: Of the shared experts' kernels.
        rngs: Keys for the initializers.
        recipe: How all products but the router's are quantized; None is
            `fp8jax.recipes.deepseek_v3()`. May be reassigned later, in `shared`, too.
        implementation: Kernel to use, as in `fp8jax.ragged_dot`; None picks one.

    Raises:
        ValueError: If the routing's counts do not fit each other.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_experts: int,
        *,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        normalize: bool = True,
        num_shared: int = 0,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = _EXPERTS_INIT,
        kernel_metadata: Mapping[str, Any] | None = None,
        router_init: nnx.Initializer = _KERNEL_INIT,
        shared_init: nnx.Initializer = _KERNEL_INIT,
        rngs: nnx.Rngs,
        recipe: Recipe | None = None,
        implementation: str | None = None,
    ):
        name = "fp8jax.nnx.MoE"
        ops.check_routing(name, num_experts, top_k, num_groups, top_groups)

        def kernel(k: int, n: int) -> _Kernel:
            value = kernel_init(rngs.params(), (num_experts, k, n), param_dtype)
            return _Kernel(nnx.Param(value, **(kernel_metadata or {})))

        self.router = _Router(features, num_experts, router_init, rngs)
        self.experts = _Experts(
            kernel(features, hidden_features),
            kernel(features, hidden_features),
            kernel(hidden_features, features),
        )
        shared = None
        if num_shared:
            shared = SwiGLU(
                features,
                num_shared * hidden_features,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=shared_init,
                rngs=rngs,
                recipe=recipe,
                implementation=implementation,
            )
        self.shared = shared
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scale = scale
        self.normalize = normalize
        self.dtype = dtype
        self.recipe = recipe
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., features]` to the same, in `dtype` or the common dtype of all."""
        experts = self.experts
        layers = experts.gate, experts.up, experts.down
        kernels: list[Any] = [layer.kernel.get_value() for layer in layers]
        if any(isinstance(w, QTensor) for w in kernels):
            x = x if self.dtype is None else x.astype(self.dtype)
        else:
            x, *kernels = promote_dtype((x, *kernels), dtype=self.dtype)
        y, load = ops.moe(
            x,
            self.router.kernel[...],
            self.router.bias[...],
            *kernels,
            top_k=self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            scale=self.scale,
            normalize=self.normalize,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        self.router.load[...] = load
        return y if self.shared is None else y + self.shared(x)


class _Kernel(nnx.Module):
    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel


class _Experts(nnx.Module):
    def __init__(self, gate: _Kernel, up: _Kernel, down: _Kernel):
        self.gate, self.up, self.down = gate, up, down


class _Router(nnx.Module):
    def __init__(
        self, features: int, experts: int, kernel_init: nnx.Initializer, rngs: nnx.Rngs
    ):
        shape = (features, experts)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = RouterBias(jnp.zeros(experts, jnp.float32))
        self.load = ExpertLoad(jnp.zeros(experts, jnp.int32))


def balance(model: nnx.Module, rate: float) -> None:
    """Moves the routing bias of every `MoE` in a model against its last load.

    To be called once after each step of training, inside of `nnx.jit` or out of it.
    `fp8jax.ops.balanced_bias` has the equation.

    Args:
        model: a module with `MoE` layers at any depth, stacked by `nnx.vmap` or not.
        rate: how far a bias moves; 0.001 in DeepSeek-V3.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _Router):
            bias, load = module.bias[...], module.load[...]
            module.bias[...] = ops.balanced_bias(bias, load, rate)
