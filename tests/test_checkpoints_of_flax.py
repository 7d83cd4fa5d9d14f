"""Checkpoints go from Flax's BF16 models to FP8 ones and back, without conversion."""

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import fp8jax.linen
import fp8jax.nnx

D, HEADS = 32, 4
OPTIONS = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


def nnx_model(layers, seed):
    """A layer of each kind, out of `flax.nnx` or `fp8jax.nnx`."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            options = {"rngs": rngs, **OPTIONS}
            self.attention = layers.MultiHeadAttention(
                HEADS, D, decode=False, **options
            )
            self.up = layers.LinearGeneral(D, (2, D), **options)
            self.mix = layers.Einsum("btgd,gdk->btk", (2, D, D), (D,), **options)
            self.down = layers.Linear(D, D, **options)

        def __call__(self, x):
            return self.down(self.mix(self.up(x + self.attention(x))))

    return Model(nnx.Rngs(seed))


def linen_model(layers):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + layers.MultiHeadAttention(num_heads=HEADS, **OPTIONS)(x)
            x = layers.DenseGeneral((2, D), **OPTIONS)(x)
            x = layers.Einsum((2, D, D), "btgd,gdk->btk", **OPTIONS)(x)
            return layers.Dense(D, **OPTIONS)(x)

    return Model()


def through_msgpack(tree, template, path):
    path.write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(template, path.read_bytes())


def through_orbax(tree, template, path):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(tree))
        return checkpointer.restore(path, args=ocp.args.StandardRestore(template))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (2, 8, D), jnp.bfloat16)


@pytest.fixture(autouse=True)
def standard_promotion():
    # Flax's attention in bfloat16 mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def sgd(params, grads):
    return jax.tree.map(lambda p, g: p - g.astype(p.dtype), params, grads)


def test_linen_checkpoint_loads_trains_in_fp8_and_goes_back(x, tmp_path):
    flax_model, fp8_model = linen_model(nn), linen_model(fp8jax.linen)
    saved = jax.jit(flax_model.init)(jax.random.key(1), x)
    template = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(fp8_model.init, jax.random.key(2), x)
    )
    for through in (through_msgpack, through_orbax):
        loaded = through(saved, template, tmp_path / f"flax_{through.__name__}")
        chex.assert_trees_all_equal(loaded, saved)
    y = fp8_model.apply(loaded, x)
    assert np.any(y != flax_model.apply(saved, x))
    loss = jax.jit(lambda p: jnp.square(fp8_model.apply(p, x)).mean())
    grads = jax.grad(loss)(loaded)
    trained = sgd(loaded, grads)
    for through in (through_msgpack, through_orbax):
        exported = through(trained, saved, tmp_path / f"fp8_{through.__name__}")
        chex.assert_trees_all_equal(exported, trained)
    assert np.any(flax_model.apply(exported, x) != flax_model.apply(saved, x))


def test_nnx_checkpoint_loads_trains_in_fp8_and_goes_back(x, tmp_path):
    flax_model, fp8_model = nnx_model(nnx, 1), nnx_model(fp8jax.nnx, 2)
    saved = nnx.to_pure_dict(nnx.state(flax_model))
    template = nnx.to_pure_dict(nnx.state(fp8_model))
    graphdef, state = nnx.split(fp8_model)

    def apply(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(x)

    for through in (through_msgpack, through_orbax):
        loaded = through(saved, template, tmp_path / f"flax_{through.__name__}")
        chex.assert_trees_all_equal(loaded, saved)
    assert np.any(apply(loaded, x) != flax_model(x))
    grads = jax.grad(lambda p: jnp.square(apply(p, x)).mean())(loaded)
    trained = sgd(loaded, grads)
    for through in (through_msgpack, through_orbax):
        exported = through(trained, saved, tmp_path / f"fp8_{through.__name__}")
        chex.assert_trees_all_equal(exported, trained)
    before, flax_state = flax_model(x), nnx.state(flax_model)
    nnx.replace_by_pure_dict(flax_state, exported)
    nnx.update(flax_model, flax_state)
    assert np.any(flax_model(x) != before)
