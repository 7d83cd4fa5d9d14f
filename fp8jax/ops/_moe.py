"""A mixture of experts from end to end: what the layers of Flax share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import numerics
from fp8jax.ops._expert_mlp import expert_mlp, is_fused
from fp8jax.ops._explicit import refuse_explicit
from fp8jax.ops._grouped_product import ALIGNMENT
from fp8jax.ops._permute import dispatch, permute, unpermute
from fp8jax.ops._routing import route
from fp8jax.quant import QTensor
from fp8jax.recipes import Recipe, recipe_or_default

# Of an expert, on average, if groups are aligned. That adds up to 127 to each: with
# fewer, most of what is written would be zeros.
_FEWEST_ROWS = 32


def moe(
    x: jax.Array,
    router: jax.Array,
    bias: jax.Array,
    w_gate: jax.Array | QTensor,
    w_up: jax.Array | QTensor,
    w_down: jax.Array | QTensor,
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

    Each expert's rows begin at a multiple of 128 where there are 32 times as many rows
    (`tokens * top_k`) as experts or more: the permutation writes them anyway, rows in
    between are zero, and no tile along tokens is shared, so that `expert_mlp` reads and
    writes less in its backward pass. That is decided by shapes alone, for training and
    inference alike, because the rows are laid out before it is known whether there is a
    backward pass; the result's bits do not depend on it. With few tokens, as in
    decoding, most of the rows would be empty, so there they stay one behind the other,
    as they do with weights that are QTensors, which have no wgrad.

    Args:
        x: `[..., k]`, bfloat16, float16 or float32.
        router: float32 `[k, experts]`.
        bias: float32 `[experts]`, as in `route`.
        w_gate, w_up: `[experts, k, hidden]` in a dtype of x's, or QTensors, as in
            `expert_mlp`.
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
    refuse_explicit("moe", x, router, bias, w_gate, w_up, w_down)
    tokens = x.reshape(-1, x.shape[-1])
    # A GPU's default for float32 products is TF32: its errors would reorder scores.
    logits = jnp.matmul(
        tokens.astype(jnp.float32), router, precision=lax.Precision.HIGHEST
    )
    routed = route(logits, bias, **routing)
    recipe = recipe_or_default("moe", recipe)
    many = not numerics.is_symbolic(
        tokens
    ) and routed.experts.size >= _FEWEST_ROWS * len(bias)
    aligned = many and is_fused(recipe, tokens, w_gate, w_up, w_down)
    to = dispatch(routed.experts, len(bias), align=ALIGNMENT if aligned else 1)
    rows = expert_mlp(
        permute(tokens, to),
        w_gate,
        w_up,
        w_down,
        to.group_sizes,
        recipe=recipe,
        implementation=implementation,
        aligned=aligned,
    )
    y = unpermute(rows, routed.weights, to)
    return y.reshape(*x.shape[:-1], y.shape[-1]), to.load
