"""Results have the dtypes that JAX's own products give, of operands of any two."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fp8jax
from fp8jax import ops, recipes

DTYPES = jnp.bfloat16, jnp.float16, jnp.float32
PAIRS = list(itertools.product(DTYPES, DTYPES))
DIMS = (((1,), (0,)), ((), ()))
SIZES = jnp.array([4, 4], jnp.int32)
every_pair = pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS, ids=str)
every_mode = pytest.mark.parametrize("mode", ["standard", "strict"])


def arrays(x_dtype, w_dtype):
    return jnp.ones((8, 128), x_dtype), jnp.ones((128, 16), w_dtype)


@every_pair
@every_mode
@pytest.mark.parametrize("preferred", [None, *DTYPES], ids=str)
def test_dot_general_and_ragged_dot_give_the_dtype_of_lax(
    x_dtype, w_dtype, mode, preferred
):
    x, w = arrays(x_dtype, w_dtype)
    experts = jnp.stack([w, w])
    how: Any = {"preferred_element_type": preferred}
    specs = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    with jax.numpy_dtype_promotion(mode):
        want = jax.eval_shape(lambda: lax.dot_general(x, w, DIMS, **how))
        for ours in (
            lambda: fp8jax.dot_general(x, w, DIMS, **how),
            lambda: ops.quantized_dot(x, w, DIMS, *specs, **how),
        ):
            got = jax.eval_shape(ours)
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
        want = jax.eval_shape(lambda: lax.ragged_dot(x, experts, SIZES, **how))
        got = jax.eval_shape(lambda: fp8jax.ragged_dot(x, experts, SIZES, **how))
        assert (got.dtype, got.shape) == (want.dtype, want.shape)


@every_pair
def test_einsum_gives_the_dtype_of_jnp(x_dtype, w_dtype):
    x, w = arrays(x_dtype, w_dtype)
    with jax.numpy_dtype_promotion("standard"):
        got = jax.eval_shape(lambda: ops.einsum("tk,kn->tn", x, w))
        assert got.dtype == jax.eval_shape(lambda: jnp.einsum("tk,kn->tn", x, w)).dtype
    if x_dtype != w_dtype:
        with (
            jax.numpy_dtype_promotion("strict"),
            pytest.raises(ValueError, match="promotion"),
        ):
            ops.einsum("tk,kn->tn", x, w)


@every_pair
@every_mode
@pytest.mark.parametrize("recipe", [recipes.deepseek_v3(), recipes.bf16_wgrad()])
def test_gradients_have_the_dtypes_of_their_operands(x_dtype, w_dtype, mode, recipe):
    x, w = arrays(x_dtype, w_dtype)
    with jax.numpy_dtype_promotion(mode):
        dx, dw = jax.grad(
            lambda x, w: (
                fp8jax.dot_general(x, w, DIMS, recipe=recipe).astype(jnp.float32).sum()
            ),
            (0, 1),
        )(x, w)
    assert (dx.dtype, dw.dtype) == (x_dtype, w_dtype)
    # Ones: every sum is an integer that all of these hold.
    np.testing.assert_array_equal(dx, jnp.full_like(x, 16))
    np.testing.assert_array_equal(dw, jnp.full_like(w, 8))


@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_gated_mlps_of_several_dtypes_are_products_of_lax_in_a_row(mode):
    x, gate = arrays(jnp.float16, jnp.float16)
    up, down = gate.astype(jnp.bfloat16), jnp.ones((16, 8), jnp.float16)

    def plain(x, gate, up, down):
        # In the dtype that a product of the two would have.
        between = lax.dot_general(gate, up, (((0,), (0,)), ((), ()))).dtype
        return lax.dot_general(jnp.ones((8, 16), between), down, DIMS)

    with jax.numpy_dtype_promotion(mode):
        want = jax.eval_shape(plain, x, gate, up, down)
        got = jax.eval_shape(ops.swiglu_mlp, x, gate, up, down)
        assert got.dtype == want.dtype == jnp.bfloat16
        experts = [jnp.stack([w, w]) for w in (gate, up, down)]
        got = jax.eval_shape(ops.expert_mlp, x, *experts, SIZES)
        assert got.dtype == want.dtype


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"), [(jnp.float16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)]
)
def test_fp8_transform_gives_the_dtypes_of_the_function(x_dtype, w_dtype):
    x = jnp.ones((128, 256), x_dtype)
    params = {"w": jnp.ones((256, 128), w_dtype)}

    def plain(params, x):
        return lax.dot_general(x, params["w"], DIMS)

    transformed = fp8jax.fp8_transform(plain)
    assert transformed.report(params, x).fraction == 1
    got, want = transformed(params, x), plain(params, x)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "precision",
    [None, "highest", "F32_F32_F32", "BF16_BF16_F32_X3", ("high", "default")],
)
def test_precision_is_whatever_lax_takes_and_goes_to_products_left_out(precision):
    x, w = jnp.ones((8, 128)), jnp.ones((128, 128))
    dims = (((1,), (0,)), ((), ()))
    recipe = dataclasses.replace(recipes.deepseek_v3(), wgrad=None)

    def precisions(dot):
        def loss(w):
            return dot(x, w, dims, precision).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(w)
        return set(re.findall(r"precision=(\S+)", str(jaxpr)))

    ours = precisions(functools.partial(fp8jax.dot_general, recipe=recipe))
    assert precisions(jax.lax.dot_general) <= ours
    sizes = jnp.array([4, 4])
    run = functools.partial(fp8jax.ragged_dot, precision=precision)
    assert jax.eval_shape(run, x, jnp.stack([w, w]), sizes).shape == (8, 128)


def test_precision_that_is_none_is_refused_though_all_is_in_fp8():
    x, w = jnp.ones((8, 128)), jnp.ones((128, 128))
    with pytest.raises(ValueError, match="BF17"):
        fp8jax.dot_general(x, w, (((1,), (0,)), ((), ())), "BF17")


SIDES = jax.random.normal(jax.random.key(0), (128, 128))
CALLS = {
    "dot_general": lambda w: fp8jax.dot_general(SIDES, w, (((1,), (0,)), ((), ()))),
    "einsum": lambda w: ops.einsum("mk,kn->mn", SIDES, w),
    "swiglu_mlp": lambda w: ops.swiglu_mlp(SIDES, SIDES, w, SIDES),
    "rms_norm_dot": lambda w: ops.rms_norm_dot(SIDES, jnp.ones(128), w),
    "ragged_dot": lambda w: fp8jax.ragged_dot(SIDES, w, jnp.asarray([128])),
}


@pytest.mark.parametrize("name", CALLS)
def test_codes_and_lists_in_an_arrays_place_are_named(name):
    codes = fp8jax.quantize(SIDES, fp8jax.BLOCK_128X128)
    with pytest.raises(
        TypeError, match=rf"{name} takes arrays.* got a QTensor \(128, "
    ):
        CALLS[name](codes)
    with pytest.raises(TypeError, match=f"{name} takes arrays, got list"):
        CALLS[name]([1.0])
