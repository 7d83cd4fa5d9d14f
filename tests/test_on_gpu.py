"""What only a GPU shows: XLA's and Mosaic's codes, and a whole layer, side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import matmul, numerics, recipes
from fp8jax.testing import (
    ALL_BF16,
    ALL_FP16,
    lognormal_tokens,
    positive_uniform,
    quantize_numpy,
)

pytestmark = pytest.mark.gpu

DIMS = (((1,), (0,)), ((), ()))
IMPLEMENTATIONS = ("xla", "mosaic_gpu")
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def lattice(patterns, dtype):
    """The patterns in range, each in a tile whose scale is 1 by what stands beside."""
    values = patterns.astype(np.float32)
    x = np.zeros((patterns.size, 128), patterns.dtype)
    x[:, 0] = numerics.max_value(dtype)
    with np.errstate(invalid="ignore"):
        x[:, 1] = np.where(np.abs(values) <= numerics.max_value(dtype), patterns, 0)
    return x


@EACH
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("patterns", [ALL_BF16, ALL_FP16], ids=["bf16", "fp16"])
def test_16_bit_inputs_encode_as_ml_dtypes_does(patterns, dtype, implementation):
    x = lattice(patterns, dtype)
    spec = fp8jax.QuantSpec((1, 128), dtype)
    q = fp8jax.quantize(jnp.asarray(x), spec, implementation=implementation)
    np.testing.assert_array_equal(q.scale, 1)
    expected = x.astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(
        np.asarray(q.data).view(np.uint8), expected.view(np.uint8)
    )


@EACH
@pytest.mark.parametrize("patterns", [ALL_BF16, ALL_FP16], ids=["bf16", "fp16"])
def test_every_bad_16_bit_pattern_makes_its_tile_nan(patterns, implementation):
    x = np.zeros((patterns.size, 128), patterns.dtype)
    x[:, 77] = patterns
    q = fp8jax.quantize(jnp.asarray(x), implementation=implementation)
    bad = ~np.isfinite(patterns.astype(np.float32))
    assert np.isnan(np.asarray(q.dequantize())[bad]).all()
    # Of the scale, as bfloat16's largest numbers round up beyond float32's range.
    np.testing.assert_array_equal(np.isfinite(q.scale)[:, 0], ~bad)
    assert np.isfinite(np.asarray(q.data).astype(np.float32)[~bad]).all()


@EACH
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_implementations_give_the_reference_s_bits(wrap, scale, tile, implementation):
    x = lognormal_tokens(np.random.default_rng(0), (303, 300))
    x[0] = 0
    spec = fp8jax.QuantSpec(tile, scale=scale)
    quantize = functools.partial(
        fp8jax.quantize, spec=spec, implementation=implementation
    )
    q = wrap(quantize)(jnp.asarray(x))
    data, expected_scale = quantize_numpy(x, tile, pow2=scale == "pow2")
    np.testing.assert_array_equal(q.scale, expected_scale)
    differ = np.asarray(q.data).view(np.uint8) != data.view(np.uint8)
    assert np.mean(differ) <= (0 if scale == "pow2" else 1e-3)


@EACH
def test_quantizing_inside_jit_is_not_removed_as_excess_precision(implementation):
    x = jnp.asarray(lognormal_tokens(np.random.default_rng(1), (256, 512)))

    def fake(x):
        return fp8jax.quantize(x, implementation=implementation).dequantize()

    jitted = jax.jit(fake)(x)
    assert not np.array_equal(jitted, x)
    np.testing.assert_array_equal(jitted, fake(x))


@EACH
@pytest.mark.parametrize("rhs_tile", [(128, 128), (1, 128)])
def test_long_positive_sums_keep_their_accuracy(rhs_tile, implementation):
    rng = np.random.default_rng(0)
    x, w = (positive_uniform(rng, (256, 16384)) for _ in range(2))
    q = fp8jax.quantize(jnp.asarray(x))
    q_w = fp8jax.quantize(jnp.asarray(w), fp8jax.QuantSpec(rhs_tile))
    out = fp8jax.scaled_matmul(q, q_w, implementation=implementation)
    exact = (
        np.asarray(q.dequantize(), np.float64)
        @ np.asarray(q_w.dequantize(), np.float64).T
    )
    error = np.linalg.norm(np.asarray(out, np.float64) - exact)
    # One rounding to bfloat16, 1.7e-3 in rms. What the tensor core cuts off a chunk's
    # sum, up to 1.5e-3 by tests/kernels/test_gemm_trust.py, is less on average.
    assert error / np.linalg.norm(exact) < 2e-3


def test_the_hopper_kernels_are_the_default():
    tile, block = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    assert matmul.gemm_implementation(tile, block) == "mosaic_gpu"
    assert matmul.gemm_implementation(tile, tile) == "mosaic_gpu"
    layer = jax.jit(jax.grad(lambda x, w: fp8jax.dot_general(x, w, DIMS).sum(), (0, 1)))
    x = jnp.ones((256, 256), jnp.bfloat16)
    compiled = layer.lower(x, x).compile()
    assert compiled.as_text().count("mosaic_gpu") > 0
    fp8jax.assert_fp8_lowered(compiled)


@pytest.mark.parametrize("recipe", ["pow2", "fp32", "fp8 residual", "bf16_wgrad"])
@pytest.mark.parametrize("shape", [(1024, 768, 2048), (333, 300, 260), (1, 128, 7)])
def test_a_layer_and_its_gradients_agree_with_xla(shape, recipe):
    m, k, n = shape
    recipe = {
        "pow2": recipes.deepseek_v3(),
        "fp32": recipes.deepseek_v3("fp32"),
        "fp8 residual": recipes.deepseek_v3(residual="fp8"),
        "bf16_wgrad": recipes.bf16_wgrad(),
    }[recipe]
    rng = np.random.default_rng(0)
    x = jnp.asarray(lognormal_tokens(rng, (m, k))).astype(jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((k, n), "f") * 0.05).astype(jnp.bfloat16)
    dout = jnp.asarray(rng.standard_normal((m, n), "f")).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        def dot(x, w):
            return fp8jax.dot_general(
                x, w, DIMS, recipe=recipe, implementation=implementation
            )

        out, vjp = jax.vjp(dot, x, w)
        return out, *vjp(dout)

    for mosaic, xla in zip(run(None), run("xla"), strict=True):
        # Equal codes; FP32 sums in another order, then one bfloat16 rounding: 2^-9,
        # which is 54 dB, of every element that falls on the other side.
        assert numerics.sqnr_db(mosaic, xla) > 50


def test_layers_run_under_vmap_scan_and_remat():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((256, 256), "f")).astype(jnp.bfloat16)
    ws = jnp.asarray(rng.standard_normal((3, 256, 256), "f") * 0.06)
    ws = ws.astype(jnp.bfloat16)

    def dot(x, w):
        return fp8jax.dot_general(x, w, DIMS)

    def loss(ws, body):
        return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].sum()

    plain = jax.jit(jax.grad(functools.partial(loss, body=dot)))(ws)
    remat = jax.jit(jax.grad(functools.partial(loss, body=jax.checkpoint(dot))))(ws)
    np.testing.assert_array_equal(plain, remat)
    mapped = jax.jit(jax.vmap(dot, (None, 0)))(x, ws)
    for i in range(3):
        np.testing.assert_array_equal(mapped[i], dot(x, ws[i]))
