"""`ops.rms_norm_dot` is a norm and its products, quantized in fewer reads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax.linen
import fp8jax.nnx
from fp8jax import numerics, ops, quantize, recipes
from fp8jax.ops import _rms_norm
from fp8jax.quant import quantize_rms_norm
from fp8jax.testing import assert_same_bits

M, K, NS = 130, 200, (264, 136)

pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def arrays(dtype=jnp.float32):
    scale = 1 + normal(1, K) / 4
    weights = (normal(2 + i, K, n) * K**-0.5 for i, n in enumerate(NS))
    return [normal(0, M, K, dtype=dtype), scale, *(w.astype(dtype) for w in weights)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, *inputs):
    ys, vjp = jax.vjp(fn, *inputs)
    douts = tuple(normal(9, *y.shape, dtype=y.dtype) for y in ys)
    return ys, vjp(douts)


def apart(x, scale, *weights, dot):
    h = _rms_norm.rms_norm(1e-6, x, scale)
    return tuple(dot(h, w) for w in weights)


def fp8_dot(recipe):
    return functools.partial(
        fp8jax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), recipe=recipe
    )


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (recipes.deepseek_v3(), jnp.bfloat16),
        (recipes.deepseek_v3(residual="fp8"), jnp.float32),
        (recipes.blocked_wgrad("fp32"), jnp.float32),
    ],
    ids=["bf16", "fp8", "blocked"],
)
def test_fused_is_the_norm_and_the_products_apart(recipe, dtype):
    inputs = arrays(dtype)
    fused = value_and_gradients(
        functools.partial(ops.rms_norm_dot, recipe=recipe), *inputs
    )
    unfused = value_and_gradients(
        functools.partial(apart, dot=fp8_dot(recipe)), *inputs
    )
    # On one device and in one order of summation: the same program, step for step. XLA
    # may still contract another multiplication and addition of the norm's gradient.
    for a, e in zip(*map(jax.tree.leaves, (fused, unfused)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert numerics.sqnr_db(a, e) > 40
    exact = value_and_gradients(
        functools.partial(apart, dot=jnp.dot), *(a.astype(jnp.float32) for a in inputs)
    )
    for a, r in zip(*map(jax.tree.leaves, (fused, exact)), strict=True):
        assert numerics.sqnr_db(a, r) > 18  # Both operands off by up to 2^-4.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_backward_pass_normalizes_as_the_forward_pass_quantizes(dtype):
    x, scale, *_ = arrays(dtype)
    q, _ = quantize_rms_norm(x, scale)
    h = _rms_norm.rms_norm(1e-6, x, scale)
    assert_same_bits(q, quantize(h, fp8jax.TILE_1X128))


def test_h_is_quantized_once_for_all_weights_and_kept_for_nothing():
    x, scale, *weights = arrays()
    jaxpr = str(jax.make_jaxpr(ops.rms_norm_dot)(x, scale, *weights))
    assert jaxpr.count("name=fp8jax::quantize_rms_norm") == 1
    _, vjp = jax.vjp(ops.rms_norm_dot, x, scale, *weights)
    kept = [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.ndim]
    assert kept.count((M, K)) == 1  # x


@pytest.mark.parametrize("recipe", [recipes.bf16(), recipes.bf16_wgrad()])
def test_recipe_that_leaves_a_gemm_out_is_the_norm_and_the_products(recipe):
    inputs = arrays()

    def jaxpr(fn):
        return str(jax.make_jaxpr(fn)(*inputs))

    ours = functools.partial(ops.rms_norm_dot, recipe=recipe)
    assert jaxpr(ours) == jaxpr(functools.partial(apart, dot=fp8_dot(recipe)))


def test_tokens_may_have_any_number_of_dimensions():
    x, scale, w, _ = arrays()
    (flat,) = ops.rms_norm_dot(x, scale, w)
    (y,) = ops.rms_norm_dot(x.reshape(2, 13, 5, K), scale, w)
    assert_same_bits(y, flat.reshape(2, 13, 5, NS[0]))


def test_bad_input_is_named():
    x, scale, w, _ = arrays()
    with pytest.raises(ValueError, match=r"rms_norm_dot takes x .*got x.shape"):
        ops.rms_norm_dot(x, scale, w[1:])
    with pytest.raises(ValueError, match=r"rms_norm_dot takes x .*one at least"):
        ops.rms_norm_dot(x, scale)
    with pytest.raises(ValueError, match=r"float scale, got scale\.dtype=int32"):
        ops.rms_norm_dot(x, scale.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="rms_norm_dot takes a Recipe or None"):
        ops.rms_norm_dot(x, scale, w, recipe="fp8")
    with pytest.raises(TypeError, match="rms_norm_dot in FP8 has a gradient, but no"):
        jax.jvp(
            lambda x: jax.grad(lambda x: ops.rms_norm_dot(x, scale, w)[0].sum())(x),
            (x,),
            (x,),
        )


class NnxBlock(nnx.Module):
    """The block as Flax's own layers give it."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(K, rngs=rngs)
        self.linear = nnx.Linear(K, NS[0], use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(x))


def test_nnx_block_has_the_state_of_flax_s_layers_and_their_numbers():
    flax = NnxBlock(nnx.Rngs(0))
    ours = fp8jax.nnx.RMSNormLinear(K, NS[0], rngs=nnx.Rngs(0))
    assert_same_bits(
        nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(flax))
    )
    x = normal(0, 2, 8, K)
    assert numerics.sqnr_db(ours(x), flax(x)) > 22  # Two operands of 2^-4 each.
    ours.recipe = recipes.bf16()
    # Sums of 200 float32 products: 200 * 2^-24 = 1.2e-5 of their magnitudes each, which
    # add up to ten times a result that is not near zero.
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-4, atol=1e-5)


class LinenBlock(nn.Module):
    """The block as Flax's own layers give it."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(NS[0], use_bias=False, name="dense")(nn.RMSNorm(name="norm")(x))


def test_linen_block_has_the_parameters_of_flax_s_layers_and_their_numbers():
    x, key = normal(0, 2, 8, K), jax.random.key(0)
    flax, ours = LinenBlock(), fp8jax.linen.RMSNormDense(NS[0])
    variables = flax.init(key, x)
    assert_same_bits(jax.jit(ours.init)(key, x), variables)
    expected = flax.apply(variables, x)
    # These two as NNX's above.
    assert numerics.sqnr_db(ours.apply(variables, x), expected) > 22
    off = ours.clone(recipe=recipes.bf16()).apply(variables, x)
    np.testing.assert_allclose(off, expected, rtol=1e-4, atol=1e-5)
    half = fp8jax.linen.RMSNormDense(NS[0], dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
