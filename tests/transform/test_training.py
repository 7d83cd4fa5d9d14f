"""A byte-level model of two layers trains under the transform in every framework."""

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from fp8jax.transform import fp8_transform

D, HIDDEN, BYTES, LAYERS = 128, 256, 256, 2
TEXT = b"She sells sea shells by the sea shore; the shells she sells are sea shells. "
TOKENS = jnp.asarray(np.frombuffer(TEXT[:65], np.uint8)[None], jnp.int32)
STEPS = 6
ADAM = optax.adam(3e-3)
SHAPES = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, HIDDEN), "down": (HIDDEN, D)}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def attend(qkv):  # [..., t, 3 d] -> [..., t, d]
    q, k, v = jnp.split(qkv, 3, -1)
    scores = jnp.einsum("...td,...sd->...ts", q, k) * D**-0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ v


def block(dense, norm, x):
    """What every framework's model consists of; `dense(name, x)` is its layer."""
    x = x + dense("out", attend(dense("qkv", norm("norm_1", x))))
    return x + dense("down", jax.nn.gelu(dense("up", norm("norm_2", x))))


def next_byte_loss(logits, tokens):
    labels = tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def check_training(step, state, paths):
    """Loss falls, and each layer has its three products in FP8, and nothing else has.

    Args:
        step: `(*state, tokens) -> (*state, loss)`.
        state: where it starts.
        paths: of the layers' weights.
    """
    report = step.report(*state, TOKENS)
    fp8 = sorted((r.path, r.role) for r in report.rows if r.status == "fp8")
    roles = ("dgrad", "fprop", "wgrad")
    assert fp8 == sorted(itertools.product(paths, roles)), str(report)
    losses = []
    for _ in range(STEPS):
        *state, loss = step(*state, TOKENS)
        losses.append(float(loss))
    # No bound of an error: that it learns.
    assert losses[-1] < 0.8 * losses[0], losses
    return state


def in_layers(prefix, suffix=""):
    return [f"{prefix}{i}/{name}{suffix}" for i in range(LAYERS) for name in SHAPES]


def test_plain_dicts_train():
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def layer():
        return {n: jax.random.normal(next(keys), s) * 0.09 for n, s in SHAPES.items()}

    params = {
        "embed": jax.random.normal(next(keys), (BYTES, D)) * 0.1,
        "layers": [layer() for _ in range(LAYERS)],
        "lm_head": jax.random.normal(next(keys), (D, BYTES)) * 0.1,
    }

    def loss_fn(params, tokens):
        x = params["embed"][tokens[:, :-1]]
        for layer in params["layers"]:
            dense = lambda name, x, layer=layer: x @ layer[name]  # noqa: E731
            x = block(dense, lambda _, x: jax.nn.standardize(x), x)
        return next_byte_loss(x @ params["lm_head"], tokens)

    @fp8_transform
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = ADAM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    check_training(step, (params, ADAM.init(params)), in_layers("layers/"))


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, tokens):
        x = flax.linen.Embed(BYTES, D, name="embed")(tokens)
        for i in range(LAYERS):
            x = LinenBlock(name=f"block_{i}")(x)
        return flax.linen.Dense(BYTES, name="head")(x)


class LinenBlock(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        def dense(name, x):
            return flax.linen.Dense(SHAPES[name][1], name=name)(x)

        return block(dense, lambda n, x: flax.linen.LayerNorm(name=n)(x), x)


def test_linen_train_state_trains():
    model = LinenModel()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ADAM)

    @fp8_transform
    @jax.jit
    def step(state, tokens):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, tokens[:, :-1])
            return next_byte_loss(logits, tokens)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    paths = in_layers("params/block_", "/kernel")
    (state,) = check_training(step, (state,), paths)
    assert int(state.step) == STEPS


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        for name, (n_in, n_out) in SHAPES.items():
            setattr(self, name, nnx.Linear(n_in, n_out, rngs=rngs))
        self.norm_1, self.norm_2 = (nnx.LayerNorm(D, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        norm = dense = lambda name, x: getattr(self, name)(x)
        return block(dense, norm, x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(BYTES, D, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(D, BYTES, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.blocks:
            x = layer(x)
        return self.head(x)


def test_nnx_modules_train_in_place():
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, tokens):
        def loss_fn(model):
            return next_byte_loss(model(tokens[:, :-1]), tokens)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    fp8_update = fp8_transform(update)

    class Step:  # Of no state: the modules hold it.
        @staticmethod
        def report(tokens):
            return fp8_update.report(model, optimizer, tokens)

        def __call__(self, tokens):
            return [fp8_update(model, optimizer, tokens)]

    check_training(Step(), (), in_layers("blocks/", "/kernel"))
    assert int(optimizer.step[...]) == STEPS


def equinox_model(eqx, key):
    """The model as Equinox modules; they are made here, as Equinox may be missing."""

    class EqxBlock(eqx.Module):
        qkv: eqx.nn.Linear
        out: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        norm: eqx.nn.LayerNorm
        dropout: eqx.nn.Dropout  # Its rate and its mode are leaves that are no arrays.

        def __init__(self, key):
            keys = jax.random.split(key, len(SHAPES))
            for (name, shape), k in zip(SHAPES.items(), keys, strict=True):
                setattr(self, name, eqx.nn.Linear(*shape, key=k))
            self.norm = eqx.nn.LayerNorm(D)
            self.dropout = eqx.nn.Dropout(0.1, inference=True)

        def __call__(self, x):
            def dense(name, x):
                return jax.vmap(getattr(self, name))(x)

            return self.dropout(block(dense, lambda _, x: jax.vmap(self.norm)(x), x))

    class EqxModel(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: list[EqxBlock]
        head: eqx.nn.Linear
        activation: object

        def __init__(self, key):
            keys = jax.random.split(key, LAYERS + 2)
            self.embed = eqx.nn.Embedding(BYTES, D, key=keys[0])
            self.blocks = [EqxBlock(k) for k in keys[2:]]
            self.head = eqx.nn.Linear(D, BYTES, key=keys[1])
            self.activation = jax.nn.soft_sign

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens)
            for layer in self.blocks:
                x = layer(x)
            return jax.vmap(self.head)(self.activation(x))

    return EqxModel(key)


def test_equinox_filter_jit_step_trains():
    eqx = pytest.importorskip("equinox")
    model = equinox_model(eqx, jax.random.key(0))

    @eqx.filter_value_and_grad
    def loss_fn(model, tokens):
        return next_byte_loss(jax.vmap(model)(tokens[:, :-1]), tokens)

    @fp8_transform
    @eqx.filter_jit
    def step(model, state, tokens):
        loss, grads = loss_fn(model, tokens)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = ADAM.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    state = ADAM.init(eqx.filter(model, eqx.is_inexact_array))
    paths = in_layers("blocks/", "/weight")
    trained, _ = check_training(step, (model, state), paths)
    assert trained.activation is model.activation
    assert trained.blocks[0].dropout.inference is True


def haiku_loss(hk, tokens):
    def dense(prefix, name, x):
        return hk.Linear(SHAPES[name][1], name=f"{prefix}_{name}")(x)

    x = hk.Embed(BYTES, D, name="embed")(tokens[:, :-1])
    for i in range(LAYERS):
        norm = lambda _, x: hk.RMSNorm(-1)(x)  # noqa: E731
        x = block(functools.partial(dense, f"layer_{i}"), norm, x)
    return next_byte_loss(hk.Linear(BYTES, name="lm_head")(x), tokens)


def test_haiku_transformed_step_trains():
    hk = pytest.importorskip("haiku")
    loss = hk.without_apply_rng(hk.transform(functools.partial(haiku_loss, hk)))
    params = loss.init(jax.random.key(0), TOKENS)

    @fp8_transform
    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss.apply)(params, tokens)
        updates, state = ADAM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    paths = [f"layer_{i}_{name}/w" for i in range(LAYERS) for name in SHAPES]
    check_training(step, (params, ADAM.init(params)), paths)
