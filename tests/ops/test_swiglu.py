"""`ops.swiglu_mlp` is the block of three products, quantized in fewer reads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax.linen
import fp8jax.nnx
from fp8jax import numerics, ops, recipes
from fp8jax.ops import _swiglu
from fp8jax.testing import assert_same_bits

M, K, HIDDEN, N = 130, 200, 264, 136


pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def arrays(dtype):
    shapes = (M, K), (K, HIDDEN), (K, HIDDEN), (HIDDEN, N)
    x, *weights = (normal(i, *shape) for i, shape in enumerate(shapes))
    weights = (w * w.shape[0] ** -0.5 for w in weights)
    return [a.astype(dtype) for a in (x, *weights)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, *inputs):
    y, vjp = jax.vjp(fn, *inputs)
    return y, vjp(normal(9, *y.shape, dtype=y.dtype))


def plain(x, w_gate, w_up, w_down):
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (recipes.deepseek_v3(), jnp.bfloat16),
        (recipes.deepseek_v3(residual="fp8"), jnp.float32),
        (recipes.blocked_wgrad("fp32", "fp8"), jnp.float32),
    ],
    ids=["bf16", "fp8", "blocked fp8"],
)
def test_fused_is_the_unfused_block_but_for_codes_at_ties(recipe, dtype):
    inputs = arrays(dtype)
    fused = value_and_gradients(
        functools.partial(ops.swiglu_mlp, recipe=recipe), *inputs
    )
    how = {"recipe": recipe, "implementation": None}
    unfused = value_and_gradients(functools.partial(_swiglu._unfused, **how), *inputs)
    exact = value_and_gradients(plain, *(a.astype(jnp.float32) for a in inputs))
    for a, e, r in zip(*map(jax.tree.leaves, (fused, unfused, exact)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        # Two in a thousand codes may be off by 2^-3 of themselves, 45 dB, in h and
        # again in its gradients, each.
        assert numerics.sqnr_db(a, e) > 40
        # Chains of up to four products, each operand off by up to 2^-4 of itself.
        assert numerics.sqnr_db(a, r) > 15


@pytest.mark.parametrize("recipe", [recipes.bf16(), recipes.bf16_wgrad()])
def test_recipe_that_leaves_a_gemm_out_is_the_unfused_block(recipe):
    inputs = arrays(jnp.float32)

    def unfused(*inputs):
        return _swiglu._unfused(*inputs, recipe=recipe, implementation=None)

    def jaxpr(fn):
        return str(jax.make_jaxpr(fn)(*inputs))

    ours = functools.partial(ops.swiglu_mlp, recipe=recipe)
    assert jaxpr(ours) == jaxpr(unfused)
    assert "quantize_swiglu" in jaxpr(ops.swiglu_mlp)


def test_arrays_of_several_dtypes_are_the_unfused_block():
    inputs = arrays(jnp.float32)
    mixed = [inputs[0].astype(jnp.bfloat16), *inputs[1:]]
    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(ops.swiglu_mlp)(*mixed)
    assert jaxpr.out_avals[0].dtype == jnp.float32
    assert "quantize_swiglu" not in str(jaxpr)


def test_tokens_may_have_any_number_of_dimensions():
    x, *weights = arrays(jnp.float32)
    flat = ops.swiglu_mlp(x, *weights)
    y = ops.swiglu_mlp(x.reshape(2, 13, 5, K), *weights)
    assert_same_bits(y, flat.reshape(2, 13, 5, N))


def test_bad_input_is_named():
    x, gate, up, down = arrays(jnp.float32)
    with pytest.raises(ValueError, match=r"swiglu_mlp takes x \[.*got x.shape"):
        ops.swiglu_mlp(x, gate, up[:, :-1], down)
    with pytest.raises(ValueError, match=r"swiglu_mlp takes a Recipe or None"):
        ops.swiglu_mlp(x, gate, up, down, recipe="fp8")
    with pytest.raises(ValueError, match=r"swiglu_mlp takes bfloat16.*rhs.dtype=int32"):
        ops.swiglu_mlp(x, gate, up, down.astype(jnp.int32))
    with pytest.raises(TypeError, match="swiglu_mlp in FP8 has a gradient, but no"):
        jax.jvp(
            lambda x: jax.grad(lambda x: ops.swiglu_mlp(x, gate, up, down).sum())(x),
            (x,),
            (x,),
        )


class NnxBlock(nnx.Module):
    """The block as Flax's own layers give it."""

    def __init__(self, rngs):
        self.gate = nnx.Linear(K, HIDDEN, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(K, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, K, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def test_nnx_block_has_the_state_of_flax_s_layers_and_their_numbers():
    flax = NnxBlock(nnx.Rngs(0))
    ours = fp8jax.nnx.SwiGLU(K, HIDDEN, rngs=nnx.Rngs(0))
    assert_same_bits(
        nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(flax))
    )
    x = normal(0, 2, 8, K)
    assert ours(x).shape == x.shape
    # Four operands in a row, each off by 2^-4 of itself at most, which add up as
    # squares: 2^-3.
    assert numerics.sqnr_db(ours(x), flax(x)) > 18
    ours.recipe = recipes.bf16()
    # Sums of at most 264 float32 products: 1.6e-5 of their magnitudes each.
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-4, atol=1e-5)


class LinenBlock(nn.Module):
    """The block as Flax's own layers give it."""

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(HIDDEN, use_bias=False, name="gate")(x)
        up = nn.Dense(HIDDEN, use_bias=False, name="up")(x)
        down = nn.Dense(x.shape[-1], use_bias=False, name="down")
        return down(jax.nn.silu(gate) * up)


def test_linen_block_has_the_parameters_of_flax_s_layers_and_their_numbers():
    x, key = normal(0, 2, 8, K), jax.random.key(0)
    flax, ours = LinenBlock(), fp8jax.linen.SwiGLU(HIDDEN)
    variables = flax.init(key, x)
    assert_same_bits(jax.jit(ours.init)(key, x), variables)
    expected = flax.apply(variables, x)
    # These two as NNX's above.
    assert numerics.sqnr_db(ours.apply(variables, x), expected) > 18
    off = ours.clone(recipe=recipes.bf16()).apply(variables, x)
    np.testing.assert_allclose(off, expected, rtol=1e-4, atol=1e-5)
    half = fp8jax.linen.SwiGLU(HIDDEN, dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
