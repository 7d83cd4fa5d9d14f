"""Layers whose kernel is a QTensor, in NNX and in Linen alike."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from fp8jax import recipes

IN, OUT = 200, 160  # No multiples of a tile.
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


@pytest.fixture
def params():
    k = jax.random.split(jax.random.key(0))
    kernel = fp8jax.quantize(jax.random.normal(k[0], (IN, OUT)), SPEC)
    return {"kernel": kernel, "bias": jax.random.normal(k[1], (OUT,))}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, IN))


def by_nnx(params, x, **options):
    use_bias = params["bias"] is not None
    layer = fp8jax.nnx.Linear(IN, OUT, rngs=nnx.Rngs(0), use_bias=use_bias, **options)
    nnx.update(layer, {k: v for k, v in params.items() if v is not None})
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def by_linen(params, x, **options):
    use_bias = params["bias"] is not None
    layer = fp8jax.linen.Dense(OUT, use_bias=use_bias, **options)
    variables = {"params": {k: v for k, v in params.items() if v is not None}}
    return jax.jit(layer.apply)(variables, x)


both = pytest.mark.parametrize("apply", [by_nnx, by_linen])


@both
@pytest.mark.parametrize("recipe", [None, recipes.deepseek_v3(scale="fp32")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_is_the_product_of_the_codes(params, x, apply, recipe, dtype, use_bias):
    spec = fp8jax.TILE_1X128
    if recipe is not None:
        spec = recipe.fprop.lhs
    params = params if use_bias else {**params, "bias": None}

    @jax.jit
    def expected(params, x):
        q = fp8jax.quantize(x.astype(dtype).reshape(-1, IN), spec)
        y = fp8jax.scaled_matmul(q, params["kernel"].T, out_dtype=dtype)
        y = y.reshape(2, 5, OUT)
        return y + params["bias"].astype(dtype) if use_bias else y

    y = apply(params, x, recipe=recipe, dtype=dtype)
    assert y.dtype == dtype
    chex.assert_trees_all_equal(y, expected(params, x))


@both
def test_is_close_to_the_product_of_the_values(params, x, apply):
    exact = x @ params["kernel"].dequantize() + params["bias"]
    error = fp8jax.numerics.relative_error(apply(params, x), exact)
    assert error < 2**-4  # A code's largest rounding error; that of a sum is less.


@both
def test_a_vector_is_one_row(params, x, apply):
    chex.assert_trees_all_close(
        apply(params, x[0, 0]), apply(params, x)[0, 0], rtol=1e-6
    )


def test_program_is_given_one_byte_a_weight(params, x):
    layer = fp8jax.linen.Dense(OUT)
    lowered = jax.jit(layer.apply).lower({"params": params}, x)
    memory = lowered.compile().memory_analysis()
    arguments = params["kernel"].nbytes + params["bias"].nbytes + x.nbytes
    assert memory.argument_size_in_bytes <= arguments + 64


@both
def test_refusals_name_the_layer(params, x, apply):
    with pytest.raises(ValueError, match=r"fp8jax\.(nnx|linen).*no .*of yours"):
        apply(params, x, dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="whose fprop is in FP8"):
        apply(params, x, recipe=recipes.bf16())
    with pytest.raises(ValueError, match=r"\(2, 5, 199\) and \(200, 160\)"):
        apply(params, x[..., 1:])
    with pytest.raises(TypeError, match="has no gradient: it is for inference"):
        jax.grad(lambda x: apply(params, x).sum())(x)


def test_linen_checks_the_kernels_features(params, x):
    with pytest.raises(ValueError, match=r"features=7 got a QTensor.*\(200, 160\)"):
        fp8jax.linen.Dense(7).apply({"params": params}, x)


def test_nnx_layers_keep_their_qtensor_through_split_and_merge(params, x):
    layer = fp8jax.nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    merged = nnx.merge(*nnx.split(layer))
    assert isinstance(merged.kernel.get_value(), fp8jax.QTensor)
    np.testing.assert_array_equal(merged(x), layer(x))
