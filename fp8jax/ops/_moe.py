"""A mixture of experts from end to end: what the layers of Flax share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.ops._expert_mlp import expert_mlp
from fp8jax.ops._permute import dispatch, permute, unpermute
from fp8jax.ops._routing import route
from fp8jax.recipes import Recipe


def moe(
    x: jax.Array,
    router: jax.Array,
    bias: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    recipe: Recipe | None = None,
    implementation: str | None = None,
    **routing: Any,
) -> tuple[jax.Array, jax.Array]:
    r"""DeepSeek-V3's mixture of experts, without its shared ones.

    $$y_t = \sum_{e \in route(x_t)} w_{te} \, mlp_e(x_t)$$

    Scores are computed in float32; tokens are sorted by expert, go through
    `expert_mlp`, and are summed in float32. No token is dropped. Shapes are static;
    how many tokens an expert has stays on the device.

    Args:
        x: `[..., k]`, bfloat16, float16 or float32.
        router: float32 `[k, experts]`.
        bias: float32 `[experts]`, as in `route`.
        w_gate, w_up: `[experts, k, hidden]` in a dtype of x's.
        w_down: `[experts, hidden, n]`, likewise.
        recipe, implementation: as in `expert_mlp`.
        **routing: what else `route` takes: `top_k`, and others with defaults there.

    Returns:
        `[..., n]`, and the load: tokens of each expert, int32 `[experts]`.

    Raises:
        ValueError, NotImplementedError, TypeError: As `route` and `expert_mlp` do.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2.
    """
    if x.ndim < 1 or router.shape != (x.shape[-1], *w_gate.shape[:1]):
        raise ValueError(
            "moe takes x [..., k], a router [k, experts] and weights [experts, k, "
            f"hidden], got {x.shape=}, {router.shape=}, {w_gate.shape=}."
        )
    tokens = x.reshape(-1, x.shape[-1])
    # A GPU's default for float32 products is TF32: its errors would reorder scores.
    logits = jnp.matmul(
        tokens.astype(jnp.float32), router, precision=lax.Precision.HIGHEST
    )
    routed = route(logits, bias, **routing)
    to = dispatch(routed.experts, len(bias))
    rows = expert_mlp(
        permute(tokens, to),
        w_gate,
        w_up,
        w_down,
        to.group_sizes,
        recipe=recipe,
        implementation=implementation,
    )
    y = unpermute(rows, routed.weights, to)
    return y.reshape(*x.shape[:-1], y.shape[-1]), to.group_sizes
