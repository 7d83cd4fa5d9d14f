"""A small decoder's train step in four frameworks: scan over layers, remat, Adam.

Tests of the transform say what becomes of every product; `benchmarks.transform` what
that costs.
"""

import dataclasses
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

D, HIDDEN, VOCABULARY, LAYERS, TOKENS = 128, 256, 64, 3, 32
SHAPES = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, HIDDEN), "down": (HIDDEN, D)}
ADAM = optax.adam(1e-3)
IDS = jnp.zeros((2, TOKENS), jnp.int32)


def attend(qkv):
    q, k, v = jnp.split(qkv, 3, -1)
    scores = jax.nn.softmax(jnp.einsum("...td,...sd->...ts", q, k) * D**-0.5)
    return jnp.einsum("...ts,...sd->...td", scores, v)


def block(dense, norm, x):
    x = x + dense("out", attend(dense("qkv", norm(x))))
    return x + dense("down", jax.nn.gelu(dense("up", norm(x))))


def loss_of(logits, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(losses)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, its arguments, the path of a layer's weight, and the head's path."""

    step: Any
    args: tuple[Any, ...]
    path: str
    head: str


def plain_case():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    stack = {
        n: jax.random.normal(next(keys), (LAYERS, *s)) * 0.1 for n, s in SHAPES.items()
    }
    params = {
        "embed": jax.random.normal(next(keys), (VOCABULARY, D)),
        "layers": stack,
        "lm_head": jax.random.normal(next(keys), (D, VOCABULARY)) * 0.1,
    }

    def loss_fn(params, tokens):
        @jax.checkpoint
        def body(x, layer):
            return block(lambda name, x: x @ layer[name], jax.nn.standardize, x), None

        x, _ = jax.lax.scan(body, params["embed"][tokens], params["layers"])
        return loss_of(x @ params["lm_head"], tokens)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = ADAM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    args = params, ADAM.init(params), IDS
    return Case(jax.jit(step), args, "layers/{}", "lm_head")


class LinenBlock(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, _):
        def dense(name, x):
            return flax.linen.Dense(SHAPES[name][1], name=name)(x)

        return block(dense, jax.nn.standardize, x), None


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, tokens):
        x = flax.linen.Embed(VOCABULARY, D, name="embed")(tokens)
        layers = flax.linen.scan(
            flax.linen.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, None)
        return flax.linen.Dense(VOCABULARY, name="head")(x)


def linen_case():
    model = LinenModel()
    params = model.init(jax.random.key(0), IDS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ADAM)

    def step(state, tokens):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, tokens), tokens)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    path, head = "params/layers/{}/kernel", "params/head/kernel"
    return Case(jax.jit(step), (state, IDS), path, head)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        for name, (n_in, n_out) in SHAPES.items():
            setattr(self, name, nnx.Linear(n_in, n_out, rngs=rngs))

    def __call__(self, x):
        dense = lambda name, x: getattr(self, name)(x)  # noqa: E731
        return block(dense, jax.nn.standardize, x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, D, rngs=rngs)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return NnxBlock(rngs)

        self.layers = stack(rngs)
        self.head = nnx.Linear(D, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return self.head(run(self.embed(tokens), self.layers))


def nnx_case():
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss_fn = lambda model: loss_of(model(tokens), tokens)  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    return Case(step, (model, optimizer, IDS), "layers/{}/kernel", "head/kernel")


def equinox_case():
    import equinox as eqx

    class Block(eqx.Module):
        qkv: Any
        out: Any
        up: Any
        down: Any

        def __init__(self, key):
            keys = jax.random.split(key, len(SHAPES))
            for (name, shape), k in zip(SHAPES.items(), keys, strict=True):
                setattr(self, name, eqx.nn.Linear(*shape, key=k))

        def __call__(self, x):
            dense = lambda name, x: jax.vmap(getattr(self, name))(x)  # noqa: E731
            return block(dense, jax.nn.standardize, x)

    class Model(eqx.Module):
        embed: Any
        layers: Any
        head: Any

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(VOCABULARY, D, key=keys[0])
            self.layers = eqx.filter_vmap(Block)(jax.random.split(keys[1], LAYERS))
            self.head = eqx.nn.Linear(D, VOCABULARY, key=keys[2])

        def __call__(self, tokens):
            arrays, static = eqx.partition(self.layers, eqx.is_array)

            @jax.checkpoint
            def body(x, layer):
                return eqx.combine(layer, static)(x), None

            x, _ = jax.lax.scan(body, jax.vmap(self.embed)(tokens), arrays)
            return jax.vmap(self.head)(x)

    @eqx.filter_jit
    def step(model, state, tokens):
        @eqx.filter_value_and_grad
        def loss_fn(model):
            return loss_of(jax.vmap(model)(tokens), tokens)

        loss, grads = loss_fn(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = ADAM.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    model = Model(jax.random.key(0))
    args = model, ADAM.init(eqx.filter(model, eqx.is_inexact_array)), IDS
    return Case(step, args, "layers/{}/weight", "head/weight")


CASES = {
    "plain": plain_case,
    "linen": linen_case,
    "nnx": nnx_case,
    "equinox": equinox_case,
}
