"""No tokens at all: an empty shard or last batch, an expert's device without any.

As JAX's own: results of the same shape and dtype, and gradients of zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from fp8jax import ops, recipes

BF16 = jnp.bfloat16
X = jnp.zeros((0, 256), BF16)
W = jnp.ones((256, 128), BF16)
EXPERTS = jnp.ones((2, 256, 128), BF16)
NOBODY = jnp.zeros(2, jnp.int32)
MATRICES = ((1,), (0,)), ((), ())
STORED, STORED_DOWN = (
    fp8jax.quantize(w, fp8jax.BLOCK_128X128) for w in (EXPERTS, EXPERTS.mT)
)

# The function in FP8, JAX's own or the shape of its result, and a weight.
OPS = {
    "dot_general": (
        lambda w, **how: fp8jax.dot_general(X, w, MATRICES, **how),
        lambda w: jax.lax.dot_general(X, w, MATRICES),
        W,
    ),
    "einsum": (
        lambda w, **how: ops.einsum("bk,kn->bn", X, w, **how),
        lambda w: jnp.einsum("bk,kn->bn", X, w),
        W,
    ),
    "ragged_dot": (
        lambda w, **how: fp8jax.ragged_dot(X, w, NOBODY, **how),
        lambda w: jax.lax.ragged_dot(X, w, NOBODY),
        EXPERTS,
    ),
    "swiglu_mlp": (
        lambda w, **how: ops.swiglu_mlp(X, w, w, w.T, **how),
        lambda w: (X @ w * (X @ w)) @ w.T,
        W,
    ),
    "rms_norm_dot": (
        lambda w, **how: ops.rms_norm_dot(X, jnp.ones(256), w, **how)[0],
        lambda w: X @ w,
        W,
    ),
    "expert_mlp": (
        lambda w, **how: ops.expert_mlp(X, w, w, w.mT, NOBODY, **how),
        lambda w: jax.lax.ragged_dot(X, jnp.zeros((2, 256, 256), BF16), NOBODY),
        EXPERTS,
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("residual", ["bf16", "fp8", "recompute"])
def test_results_and_gradients_are_jax_s_own(name, residual):
    in_fp8, plain, w = OPS[name]
    recipe = recipes.deepseek_v3(residual=residual)
    y, expected = in_fp8(w, recipe=recipe), plain(w)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    grad = jax.jit(jax.grad(lambda w: in_fp8(w, recipe=recipe).sum()))(w)
    assert (grad.shape, grad.dtype) == (w.shape, w.dtype)
    assert not grad.astype(jnp.float32).any()


def test_a_contraction_of_nothing_is_zero():
    y = fp8jax.dot_general(jnp.ones((4, 0)), jnp.ones((0, 8)), MATRICES)
    np.testing.assert_array_equal(y, np.zeros((4, 8), np.float32))


def test_a_mapped_product_of_nothing_is_nothing():
    def dot(x):
        return fp8jax.dot_general(x, W, MATRICES)

    assert jax.vmap(dot)(jnp.zeros((3, 0, 256), BF16)).shape == (3, 0, 128)


@pytest.mark.parametrize(
    "layer",
    [
        lambda rngs: fp8jax.nnx.Linear(256, 128, rngs=rngs),
        lambda rngs: fp8jax.nnx.SwiGLU(256, 256, rngs=rngs),
        lambda rngs: fp8jax.nnx.RMSNormLinear(256, 128, rngs=rngs),
        lambda rngs: fp8jax.nnx.MoE(256, 128, num_experts=4, top_k=2, rngs=rngs),
    ],
    ids=["Linear", "SwiGLU", "RMSNormLinear", "MoE"],
)
def test_layers_take_none(layer):
    model = layer(nnx.Rngs(0))
    many = model(jnp.ones((1, 256)))
    assert model(jnp.zeros((0, 256))).shape == (0, *many.shape[1:])
    grads = nnx.grad(lambda model: model(jnp.zeros((0, 256))).sum())(model)
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads))


def test_linen_s_layer_takes_none():
    x = jnp.zeros((0, 7, 256))
    y, _ = fp8jax.linen.Dense(128).init_with_output(jax.random.key(0), x)
    assert y.shape == (0, 7, 128)


def test_weights_stored_in_fp8_serve_nobody():
    y = ops.expert_mlp(X, STORED, STORED, STORED_DOWN, NOBODY)
    assert (y.shape, y.dtype) == ((0, 256), BF16)
    gate, down = (jax.tree.map(lambda x: x[0], q) for q in (STORED, STORED_DOWN))
    how = {"out_dtype": BF16}
    assert ops.static_weight_dot("dot", X, gate, **how).shape == (0, 128)
    y = ops.static_weight_swiglu("swiglu", X, gate, gate, down, **how)
    assert y.shape == (0, 256)
    (y,) = ops.static_weight_rms_norm(
        "norm", X, jnp.ones(256), gate, epsilon=1e-6, **how
    )
    assert y.shape == (0, 128)


@pytest.mark.filterwarnings("ignore:.*found no matrix product")
def test_the_transform_leaves_such_a_step_as_it_is():
    def step(w, x):
        return jax.grad(lambda w: (x @ w @ w.T).sum())(w)

    np.testing.assert_array_equal(fp8jax.fp8_transform(step)(W, X), jnp.zeros_like(W))


def test_fake_quantize_of_nothing_is_nothing():
    assert fp8jax.fake_quantize(X).shape == X.shape
