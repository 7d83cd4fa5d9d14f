"""DeepSeek-V3's forward pass in plain `jax.numpy`, of the names in its files.

For tests: whole sequences, every expert on every token. Source: DeepSeek-V3 Technical
Report, arXiv:2412.19437, section 2.1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of `config.json` that the forward pass reads."""

    num_hidden_layers: int
    num_attention_heads: int
    first_k_dense_replace: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    rope_theta: float = 10000.0

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Config":
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: x for name, x in fields.items() if name in names})


def logits(params: dict[str, Any], tokens: jax.Array, config: Config) -> jax.Array:
    """Logits `[t, vocabulary]` of tokens `[t]`."""
    x = params["model.embed_tokens.weight"].astype(jnp.float32)[tokens]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        block = {n.removeprefix(at): w for n, w in params.items() if n.startswith(at)}
        h = rms_norm(x, block["input_layernorm.weight"])
        x = x + attention(block, h, config)
        h = rms_norm(x, block["post_attention_layernorm.weight"])
        dense = layer < config.first_k_dense_replace
        x = x + (mlp(block, "mlp.", h) if dense else experts(block, h, config))
    return linear(rms_norm(x, params["model.norm.weight"]), params["lm_head.weight"])


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight.astype(x.dtype).T


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + EPSILON) * weight.astype(x.dtype)


def attention(block: dict[str, Any], x: jax.Array, config: Config) -> jax.Array:
    """Multi-head latent attention: queries, and keys with values, by way of few."""

    def low_rank(name: str, x: jax.Array) -> jax.Array:
        x = rms_norm(x, block[f"self_attn.{name}_a_layernorm.weight"])
        return linear(x, block[f"self_attn.{name}_b_proj.weight"])

    t, heads = x.shape[0], config.num_attention_heads
    q = low_rank("q", linear(x, block["self_attn.q_a_proj.weight"]))
    q = q.reshape(t, heads, -1)
    compressed = linear(x, block["self_attn.kv_a_proj_with_mqa.weight"])
    latent, k_rope = jnp.split(compressed, [config.kv_lora_rank], axis=-1)
    kv = low_rank("kv", latent).reshape(t, heads, -1)
    nope = config.qk_nope_head_dim
    k_nope, v = kv[..., :nope], kv[..., nope:]
    scores = jnp.einsum("qhd,khd->hqk", q[..., :nope], k_nope)
    q_rope, k_rope = rotated(q[..., nope:], config), rotated(k_rope[:, None], config)
    scores += jnp.einsum("qhd,kd->hqk", q_rope, k_rope[:, 0])
    scores *= (nope + config.qk_rope_head_dim) ** -0.5
    scores = jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    return linear(mixed.reshape(t, -1), block["self_attn.o_proj.weight"])


def rotated(x: jax.Array, config: Config) -> jax.Array:
    """Neighbouring features of `[t, heads, d]` as complex numbers, turned by t."""
    t, _, d = x.shape
    speed = config.rope_theta ** (-jnp.arange(0, d, 2, dtype=x.dtype) / d)
    angle = (jnp.arange(t, dtype=x.dtype)[:, None] * speed)[:, None]
    real, imaginary = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = real * cos - imaginary * sin, imaginary * cos + real * sin
    return jnp.concatenate(turned, axis=-1)


def mlp(block: dict[str, Any], at: str, x: jax.Array) -> jax.Array:
    gate, up = (linear(x, block[f"{at}{name}_proj.weight"]) for name in ("gate", "up"))
    return linear(jax.nn.silu(gate) * up, block[f"{at}down_proj.weight"])


def experts(block: dict[str, Any], x: jax.Array, config: Config) -> jax.Array:
    share = shares(block, x, config)  # [t, experts]
    y = mlp(block, "mlp.shared_experts.", x)
    for i in range(config.n_routed_experts):
        y = y + share[:, i : i + 1] * mlp(block, f"mlp.experts.{i}.", x)
    return y


def shares(block: dict[str, Any], x: jax.Array, config: Config) -> jax.Array:
    """How much of each expert a token gets, most of them nothing."""
    n = config.n_routed_experts
    score = jax.nn.sigmoid(linear(x, block["mlp.gate.weight"]))
    choice = score + block["mlp.gate.e_score_correction_bias"].astype(x.dtype)
    groups = choice.reshape(len(x), config.n_group, -1)
    of_groups = jax.lax.top_k(groups, 2)[0].sum(-1)
    best = jax.lax.top_k(of_groups, config.topk_group)[1]
    is_open = jax.nn.one_hot(best, config.n_group).sum(1)
    is_open = jnp.repeat(is_open, n // config.n_group, axis=1) > 0
    choice = jnp.where(is_open, choice, -jnp.inf)
    chosen = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
    share = jax.nn.one_hot(chosen, n, dtype=x.dtype).sum(1) * score
    return share / share.sum(-1, keepdims=True) * config.routed_scaling_factor
