"""Which experts each token goes to, and how their load is kept even."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_EPSILON = 1e-20  # DeepSeek-V3's, for a token all of whose scores underflow.


class Routing(NamedTuple):
    """For each token its experts, of distinct numbers, and their weights.

    Attributes:
        experts: int32 `[tokens, top_k]`.
        weights: float32 `[tokens, top_k]`, of the experts' outputs in the token's sum.
    """

    experts: jax.Array
    weights: jax.Array


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> Routing:
    r"""DeepSeek-V3's routing: sigmoid scores, experts chosen within the best groups.

    With $s = \sigma(logits)$ and $b$ the bias, a group's score is the sum of its two
    largest $s_e + b_e$. The `top_k` experts with the largest $s_e + b_e$ are taken from
    the `top_groups` best groups, and weigh

    $$w_e = scale \cdot s_e / \sum_{e' taken} s_{e'}.$$

    So the bias decides which experts are taken, not what they weigh, and has no
    gradient. Of equal scores the lower number wins.

    A NaN among a token's logits, or in the bias, leaves open which experts are taken:
    all weights of that token are NaN, and so are its gradients. Its experts are some
    that it could have; other tokens are as they were. Infinities are no NaN: their
    scores are 0 and 1, and a bias of -inf or inf bars or forces an expert.

    Args:
        logits: float32 `[tokens, experts]`.
        bias: float32 `[experts]`; see `balanced_bias`.
        top_k: experts a token.
        num_groups: number of groups of consecutive experts, all of one size.
        top_groups: groups that a token's experts are taken from.
        scale: of the weights, DeepSeek-V3's `routed_scaling_factor`.
        normalize: whether weights are divided by their sum.

    Raises:
        ValueError: If shapes, dtypes or counts do not fit.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2.
    """
    for name, x, rank in (("logits", logits, 2), ("bias", bias, 1)):
        if x.dtype != jnp.float32 or x.ndim != rank:
            raise ValueError(
                f"route takes float32 logits [tokens, experts] and bias [experts], got "
                f"{name} {x.dtype}{list(x.shape)}."
            )
    experts = logits.shape[1]
    if bias.shape != (experts,):
        raise ValueError(
            f"route takes a bias for each of {experts} experts, got {bias.shape=}."
        )
    check_routing("route", experts, top_k, num_groups, top_groups)
    scores = jax.nn.sigmoid(logits)
    biased = scores + lax.stop_gradient(bias)[None]
    is_nan = jnp.isnan(biased)
    # NOTE: by its sign bit a NaN comes before or after all numbers in an order.
    order = jnp.where(is_nan.any(axis=1, keepdims=True), 0, biased)
    chosen = _choose(lax.stop_gradient(order), top_k, num_groups, top_groups)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if normalize:
        weights /= weights.sum(axis=1, keepdims=True) + _EPSILON
    # 1, or NaN, to which each NaN score contributes: gradients reach those, too.
    known = 1 + jnp.where(is_nan, biased, 0).sum(axis=1, keepdims=True)
    return Routing(chosen, weights * known * scale)


def _choose(
    scores: jax.Array, top_k: int, num_groups: int, top_groups: int
) -> jax.Array:
    tokens, experts = scores.shape
    if top_groups < num_groups:
        size = experts // num_groups
        grouped = scores.reshape(tokens, num_groups, size)
        best = lax.top_k(grouped, min(2, size))[0].sum(axis=2)  # [tokens, groups]
        # One expert of the group is forced, and the others are barred.
        best = jnp.where(jnp.isnan(best), jnp.inf, best)
        _, kept = lax.top_k(best, top_groups)
        is_kept = (kept[:, :, None] == jnp.arange(num_groups)[None, None]).any(axis=1)
        grouped = jnp.where(is_kept[:, :, None], grouped, -jnp.inf)
        scores = grouped.reshape(tokens, experts)
    return lax.top_k(scores, top_k)[1]


def check_routing(
    name: str, experts: int, top_k: int, num_groups: int, top_groups: int
) -> None:
    """Raises ValueError, on behalf of `name`, for counts that do not fit each other."""
    fits = (
        num_groups >= 1 and experts % num_groups == 0 and 1 <= top_groups <= num_groups
    )
    if not fits or not 1 <= top_k <= top_groups * (experts // num_groups):
        raise ValueError(
            f"{name} takes experts in num_groups groups of one size, 1 <= top_groups "
            "<= num_groups, and 1 <= top_k experts of top_groups groups, got "
            f"{experts=}, {num_groups=}, {top_groups=}, {top_k=}."
        )


def balanced_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    r"""The bias for the next step, by which overloaded experts are taken less often.

    $$b_e + rate \cdot sign(mean(load) - load_e)$$

    Args:
        bias: float32 `[..., experts]`.
        load: of the step, tokens an expert, integers or floats `[..., experts]`.
        rate: DeepSeek-V3's bias update speed, 0.001 for the most of its training.

    Raises:
        ValueError: If shapes differ.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1.2; Wang et al.,
    Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664.
    """
    if bias.shape != load.shape:
        raise ValueError(
            "balanced_bias takes a bias and a load for each expert, got "
            f"{bias.shape=}, {load.shape=}."
        )
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
