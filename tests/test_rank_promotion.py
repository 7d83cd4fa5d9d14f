"""Under `jax_numpy_rank_promotion="raise"` all works: nothing broadcasts in silence."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from fp8jax import ops, recipes
from fp8jax.quant import QuantSpec, quantize
from fp8jax.transform import fp8_transform

D, HIDDEN, EXPERTS = 128, 256, 4
RECIPES = {
    "default": None,
    "codes kept": recipes.deepseek_v3(residual="fp8"),
    "wgrad apart": recipes.bf16_wgrad(),
    "off": recipes.bf16(),
}


@pytest.fixture(autouse=True)
def _raising():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.1


X = normal(0, 2, 32, D)
ROWS = X.reshape(-1, D)
UP, DOWN = normal(1, D, HIDDEN), normal(2, HIDDEN, D)
GATES, DOWNS = normal(3, EXPERTS, D, HIDDEN), normal(4, EXPERTS, HIDDEN, D)
SIZES = jnp.array([30, 0, 20, 14], jnp.int32)
DIMS = (((2,), (0,)), ((), ()))

OPS = {
    "dot_general": lambda how: fp8jax.dot_general(X, UP, DIMS, **how),
    "einsum": lambda how: ops.einsum("btd,dh->bth", X, UP, **how),
    "ragged_dot": lambda how: fp8jax.ragged_dot(ROWS, GATES, SIZES, **how),
    "expert_mlp": lambda how: ops.expert_mlp(ROWS, GATES, GATES, DOWNS, SIZES, **how),
    "swiglu_mlp": lambda how: ops.swiglu_mlp(X, UP, UP, DOWN, **how),
    "rms_norm_dot": lambda how: ops.rms_norm_dot(X, jnp.ones(D), UP, **how),
}
NNX = {
    "Linear": lambda **how: fp8jax.nnx.Linear(D, HIDDEN, **how),
    "LinearGeneral": lambda **how: fp8jax.nnx.LinearGeneral(D, (2, D), **how),
    "Einsum": lambda **how: fp8jax.nnx.Einsum("btd,dh->bth", (D, D), (D,), **how),
    "attention": lambda **how: fp8jax.nnx.MultiHeadAttention(2, D, decode=False, **how),
    "SwiGLU": lambda **how: fp8jax.nnx.SwiGLU(D, HIDDEN, **how),
    "RMSNormLinear": lambda **how: fp8jax.nnx.RMSNormLinear(D, HIDDEN, **how),
    "MoE": lambda **how: fp8jax.nnx.MoE(
        D, HIDDEN, EXPERTS, top_k=1, num_groups=2, num_shared=1, **how
    ),
}
LINEN = {
    "Dense": functools.partial(fp8jax.linen.Dense, HIDDEN),
    "DenseGeneral": functools.partial(fp8jax.linen.DenseGeneral, (2, D)),
    "Einsum": functools.partial(fp8jax.linen.Einsum, (D, D), "btd,dh->bth"),
    "attention": functools.partial(fp8jax.linen.MultiHeadAttention, 2),
    "SwiGLU": functools.partial(fp8jax.linen.SwiGLU, HIDDEN),
    "RMSNormDense": functools.partial(fp8jax.linen.RMSNormDense, HIDDEN),
    "MoE": functools.partial(fp8jax.linen.MoE, HIDDEN, EXPERTS, 1),
}


def squares(tree):
    return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(tree))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", OPS)
def test_ops(name, recipe, monkeypatch):
    """Their gradients, too: every array of theirs is traced as a parameter."""
    names = ("X", "ROWS", "UP", "DOWN", "GATES", "DOWNS")
    arrays = [globals()[name] for name in names]

    def loss(arrays):
        for key, x in zip(names, arrays, strict=True):
            monkeypatch.setitem(globals(), key, x)
        return squares(OPS[name]({"recipe": RECIPES[recipe]}))

    assert jax.eval_shape(jax.grad(loss), arrays)[0].shape == np.shape(arrays[0])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NNX)
def test_nnx_layers(name, recipe):
    layer = NNX[name](rngs=nnx.Rngs(0), recipe=RECIPES[recipe])
    graph, state = nnx.split(layer)

    def loss(x, state):
        return squares(nnx.merge(graph, state)(x))

    grads = jax.grad(loss, argnums=(0, 1), allow_int=True)
    assert jax.eval_shape(grads, X, state)[0].shape == X.shape


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LINEN)
def test_linen_layers(name, recipe):
    layer: nn.Module = LINEN[name](recipe=RECIPES[recipe])
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    loss = jax.grad(lambda variables, x: squares(layer.apply(variables, x)), argnums=1)
    assert jax.eval_shape(loss, variables, X).shape == X.shape


def test_whole_steps_and_stored_weights():
    def loss(params, x):
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        y = jax.nn.silu(x @ params["up"]) @ params["down"]
        return squares(y) + squares(jax.lax.ragged_dot(x, params["gates"], SIZES))

    params = {"up": UP, "down": DOWN, "gates": GATES}
    for stats in (False, True):
        step = fp8_transform(jax.grad(loss), stats=stats)
        step.trace(params, ROWS)
        assert step.report(params, ROWS).fraction == 1.0
    spec = QuantSpec(tile=(128, 128))
    stored = {name: quantize(w, spec) for name, w in params.items()}
    fp8_transform(loss).trace({**stored, "gates": GATES}, ROWS)
    codes = stored["gates"], stored["gates"], quantize(DOWNS, spec)
    assert ops.expert_mlp(ROWS, *codes, SIZES).shape == ROWS.shape
