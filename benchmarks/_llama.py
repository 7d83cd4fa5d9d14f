"""A Llama-like decoder's whole train step, to compile: float32 masters, AdamW, remat.

No array of activations has as many elements as a weight, or a device's part of one, so
that HLO tells one from the other by their sizes.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

D, HIDDEN, HEADS, VOCABULARY, TOKENS = 1024, 2048, 8, 1024, 640
SHAPES = {
    **dict.fromkeys("qkvo", (D, D)),
    **dict.fromkeys(("gate", "up"), (D, HIDDEN)),
    "down": (HIDDEN, D),
}
# Which of a weight's sides is split: by tensor parallelism these, by FSDP the rows.
COLUMNS = {"q", "k", "v", "gate", "up", "head"}
ADAM = optax.adamw(1e-3)
DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

Form = Literal["scan", "unrolled", "list"]
Remat = Literal["none", "dots", "full"]
Parallel = Literal["none", "dp", "fsdp", "tp"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is compiled.

    Attributes:
        form: layers in a scan, in one that is unrolled, or in a Python list.
        remat: what of a layer is computed again in the backward pass.
        parallel: what is split over the devices; batch, batch and weights, or weights.
        layers: their number.
    """

    form: Form = "scan"
    remat: Remat = "dots"
    parallel: Parallel = "none"
    layers: int = 3

    def step(self, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """The jitted step, and types of its arguments on `mesh` with axis `"x"`."""
        params = jax.eval_shape(self._start)
        params, state = (
            jax.tree_util.tree_map_with_path(functools.partial(self._place, mesh), tree)
            for tree in (params, jax.eval_shape(ADAM.init, params))
        )
        split = self.parallel in {"dp", "fsdp"}
        batch = NamedSharding(mesh, P("x") if split else P())
        shape = (mesh.size if split else 1, TOKENS + 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch)

        def train(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
            loss, grads = jax.value_and_grad(self._loss)(params, tokens, batch)
            with jax.numpy_dtype_promotion("standard"):  # It counts in integers.
                updates, state = ADAM.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        out = (*kept, NamedSharding(mesh, P()))
        step = jax.jit(train, donate_argnums=(0, 1), out_shardings=out)
        return step, (params, state, tokens)

    def _start(self) -> dict[str, Any]:
        layer = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        layer |= {"norm_1": jnp.ones(D), "norm_2": jnp.ones(D)}
        layers = [layer] * self.layers
        return {
            "embed": jnp.zeros((VOCABULARY, D)),
            "norm": jnp.ones(D),
            "head": jnp.zeros((D, VOCABULARY)),
            "layers": layers if self.form == "list" else _stacked(layers),
        }

    def _place(self, mesh: Mesh, path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        spec = P()
        name = getattr(path[-1], "key", "")
        if self.parallel in {"fsdp", "tp"} and name in {*SHAPES, "embed", "head"}:
            side = -1 if self.parallel == "tp" and name in COLUMNS else -2
            spec = P(*("x" if i == x.ndim + side else None for i in range(x.ndim)))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def _loss(self, params: Any, tokens: jax.Array, batch: NamedSharding) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            # As users do: the compiler is told how activations lie, once a layer.
            return jax.lax.with_sharding_constraint(_layer(x, weights), batch), None

        if self.remat != "none":
            policy = DOTS if self.remat == "dots" else None
            layer = jax.checkpoint(layer, policy=policy)
        x = params["embed"].astype(jnp.bfloat16)[tokens[:, :-1]]
        x = jax.lax.with_sharding_constraint(x, batch)
        if self.form == "list":
            for weights in params["layers"]:
                x, _ = layer(x, weights)
        else:
            unroll = self.form == "unrolled"
            x, _ = jax.lax.scan(layer, x, params["layers"], unroll=unroll)
        logits = _norm(x, params["norm"]) @ params["head"].astype(jnp.bfloat16)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return jnp.mean(losses)


def _stacked(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _layer(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    y = _norm(x, w["norm_1"])
    heads = (*x.shape[:2], HEADS, D // HEADS)
    q, k, v = ((y @ w[name]).reshape(heads) for name in "qkv")
    x = x + _attended(_turned(q), _turned(k), v).reshape(x.shape) @ w["o"]
    y = _norm(x, w["norm_2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-6) * gain.astype(jnp.float32)).astype(
        x.dtype
    )


def _attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    shares = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v)


def _turned(x: jax.Array) -> jax.Array:
    """Rotary positions."""
    half = x.shape[-1] // 2
    rates = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * rates
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
