"""SwiGLU and RMS normalization as QTensors: what is asked for, and nothing silent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import numerics, quant
from fp8jax.kernels import _swiglu
from fp8jax.testing import assert_same_bits

FP32 = fp8jax.QuantSpec((1, 128), scale="fp32")
BLOCK = fp8jax.BLOCK_128X128


def arrays(count, shape, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, *shape), dtype=np.float32)
    return [jnp.asarray(a).astype(dtype) for a in x]


def silu_times(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(jnp.bfloat16)


def test_swiglu_is_the_quantization_of_its_bfloat16_values():
    gate, up = arrays(2, (130, 200))
    q, q_t = quant.quantize_swiglu(gate, up)
    h = silu_times(gate, up)
    for actual, x in ((q, h), (q_t, h.T)):
        expected = fp8jax.quantize(x)
        assert actual.tile == expected.tile
        # XLA may spell the sigmoid otherwise: an ulp of bfloat16 here and there.
        assert numerics.sqnr_db(actual.dequantize(), expected.dequantize()) > 50


def test_swiglu_gradients_are_those_of_autodiff():
    dh, gate, up = arrays(3, (130, 200))
    gradients = jax.vjp(silu_times, gate, up)[1](dh)
    found = quant.quantize_swiglu_gradient(dh, gate, up)
    for (q, q_t), expected in zip(found, gradients, strict=True):
        expected = expected.astype(jnp.float32)
        # One rounding, even over a step of 2^-3 of the value at most: rms 2^-3 /
        # sqrt(12), 28.8 dB. Bfloat16's before it is 16 times finer.
        assert numerics.sqnr_db(q.dequantize(), expected) > 25
        assert numerics.sqnr_db(q_t.dequantize(), expected.T) > 25


def test_swiglu_gives_what_was_asked_for():
    gate, up = arrays(2, (130, 200))
    both = quant.quantize_swiglu(gate, up)
    assert quant.quantize_swiglu(gate, up, spec_t=None)[1] is None
    assert quant.quantize_swiglu(gate, up, None)[0] is None
    assert_same_bits(quant.quantize_swiglu(gate, up, spec_t=None)[0], both[0])
    assert_same_bits(quant.quantize_swiglu(gate, up, None)[1], both[1])
    mixed = quant.quantize_swiglu(gate, up, fp8jax.TILE_1X128, FP32)
    assert_same_bits(mixed[0], both[0])
    assert_same_bits(mixed[1], quant.quantize_swiglu(gate, up, None, FP32)[1])
    first, second = quant.quantize_swiglu(gate, up, BLOCK, BLOCK)
    assert_same_bits(second, first.T)


@pytest.mark.parametrize("shape", [(2, 128, 70), (2, 3, 20, 129)])
def test_batches_are_matrices_one_by_one(shape):
    dh, gate, up = arrays(3, shape)
    weight = gate.reshape(-1, shape[-1])[0]
    index = (1,) * (len(shape) - 2)

    def at(tree):
        return jax.tree.map(lambda a: a[index], tree)

    for function, inputs in (
        (quant.quantize_swiglu, (gate, up)),
        (quant.quantize_swiglu_gradient, (dh, gate, up)),
    ):
        assert_same_bits(at(function(*inputs)), function(*(x[index] for x in inputs)))
    for spec in (fp8jax.TILE_1X128, fp8jax.TILE_128X1):
        found = quant.quantize_rms_norm(gate, weight, spec)
        one = quant.quantize_rms_norm(gate[index], weight, spec)
        q, inverse = at(found)
        assert_same_bits(q, one[0])
        # 200 squares added in another order, by pairs or lanes: eight roundings or so,
        # of which a root leaves half, and its own few: 2^-21.
        np.testing.assert_allclose(inverse, one[1], rtol=1e-6)


def test_rms_norm_is_the_quantization_of_its_bfloat16_values():
    (x,) = arrays(1, (130, 200))
    weight = jnp.linspace(-1, 2, 200)
    q, inverse = quant.quantize_rms_norm(x, weight, epsilon=1e-3)
    values = x.astype(jnp.float32)
    expected = jax.lax.rsqrt(jnp.mean(values**2, axis=1) + np.float32(1e-3))
    # As above.
    np.testing.assert_allclose(inverse, expected, rtol=1e-6)
    h = (values * expected[:, None] * weight).astype(jnp.bfloat16)
    exact = fp8jax.quantize(h).dequantize()
    # An ulp of bfloat16 here and there, as in SwiGLU's values above.
    assert numerics.sqnr_db(q.dequantize(), exact) > 50


@pytest.mark.parametrize("k", [1, 2, 3, 8, 128, 1000])
def test_inverse_rms_is_within_its_bound_of_the_float64_one(k):
    (x,) = arrays(1, (500, k), jnp.float32)
    _, inverse = quant.quantize_rms_norm(x, jnp.ones(k), epsilon=0.0)
    exact = (np.asarray(x, np.float64) ** 2).mean(axis=1) ** -0.5
    off = np.abs(np.asarray(inverse, np.float64) / exact - 1)
    assert off.max() <= (k + 4) * 2.0**-24


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_swiglu_is_within_its_bound_where_sigma_underflows_too(wrap):
    rng = np.random.default_rng(0)
    gate = np.concatenate([np.linspace(-110, 110, 40_001), rng.uniform(-95, -80, 9999)])
    up = rng.normal(size=gate.size) * np.exp2(rng.integers(-9, 9, gate.size))
    gate, up = gate.astype(np.float32), up.astype(np.float32)
    (h,) = wrap(_swiglu.swiglu)(jnp.asarray(gate), jnp.asarray(up))
    g, u = gate.astype(np.float64), up.astype(np.float64)
    exact = g / (1 + np.exp(-g)) * u
    bound = (13 + 1.5 * np.abs(g)) * 2.0**-24 * np.abs(exact)
    off = np.abs(np.asarray(h, np.float64) - exact)
    # The relative part alone does not hold: sigma(-88) is no normal float32.
    assert np.any(off > bound)
    assert np.all(off <= bound + (1 + np.abs(u) + np.abs(g * u)) * 2.0**-126)


def test_bad_input_is_named():
    gate, up = arrays(2, (4, 128))
    swiglu, norm = quant.quantize_swiglu, quant.quantize_rms_norm
    with pytest.raises(ValueError, match=r"quantize_swiglu takes a spec or a spec_t"):
        swiglu(gate, up, None, None)
    with pytest.raises(ValueError, match=r"one shape, got .*up=float32\[4, 128\]"):
        swiglu(gate, up.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"one shape, got .*up=bfloat16\[3, 128\]"):
        swiglu(gate, up[:3])
    with pytest.raises(ValueError, match="quantize_swiglu takes a QuantSpec, got 'e4m"):
        swiglu(gate, up, "e4m3")
    with pytest.raises(ValueError, match=r"weight=bfloat16\[4\] for x.shape=\(4, 128"):
        norm(gate, gate[:, 0])
    with pytest.raises(ValueError, match="rms_norm takes a float array, got dtype int"):
        norm(gate.astype(jnp.int32), gate[0])


def test_specs_need_not_be_the_ready_made_ones():
    gate, up = arrays(2, (20, 70))
    spec = dataclasses.replace(FP32, tile=(1, 16), dtype=jnp.float8_e5m2, eps=1e-3)
    q, q_t = quant.quantize_swiglu(gate, up, spec, spec)
    assert q.dtype == q_t.dtype == jnp.float8_e5m2
    assert (q.scale.shape, q_t.scale.shape) == ((20, 5), (70, 2))


def test_add_rms_norm_is_the_norm_of_the_sum():
    keys = jax.random.split(jax.random.key(0), 3)
    x, residual = (jax.random.normal(k, (3, 5, 300), jnp.bfloat16) for k in keys[:2])
    weight = jax.random.normal(keys[2], (300,))
    *found, total = quant.quantize_add_rms_norm(x, residual, weight, epsilon=1e-3)
    np.testing.assert_array_equal(total, x + residual)
    expected = quant.quantize_rms_norm(x + residual, weight, epsilon=1e-3)
    assert_same_bits(tuple(found), expected)
    with pytest.raises(
        ValueError, match=r"one shape and dtype, got bfloat16\[3, 5, 30"
    ):
        quant.quantize_add_rms_norm(x, x[:1], weight)
