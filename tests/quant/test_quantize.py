"""Quantizers against an independent NumPy reference and every property they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8jax
from fp8jax import numerics, quant
from fp8jax.testing import (
    ALL_BF16,
    ALL_FP16,
    assert_same_bits,
    bad_positions,
    lognormal_tokens,
    quantize_numpy,
)

SPECS = {
    "1x128": fp8jax.TILE_1X128,
    "128x1": fp8jax.TILE_128X1,
    "128x128": fp8jax.BLOCK_128X128,
    "1x128 fp32": fp8jax.QuantSpec((1, 128), scale="fp32"),
    "128x128 fp32": fp8jax.QuantSpec((128, 128), scale="fp32"),
    "1x128 e5m2": fp8jax.QuantSpec((1, 128), dtype=jnp.float8_e5m2),
    "1x16": fp8jax.QuantSpec((1, 16)),
}
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
EACH_DIVISION = pytest.mark.parametrize(
    ("wrap", "repeats"), [(lambda f: f, False), (jax.jit, False), (jax.jit, True)]
)
BOTH = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])

# Hypothesis draws seeds and shapes; arrays come from NumPy, which is far faster.
MATRICES = {
    "shape": st.sampled_from([(1, 1), (3, 128), (130, 129), (128, 256), (200, 65)]),
    "seed": st.integers(0, 2**32 - 1),
    "exponent": st.integers(-100, 100),
}


def matrix(shape, seed, exponent=0):
    x = lognormal_tokens(np.random.default_rng(seed), shape)
    return jnp.asarray(np.ldexp(x, exponent).astype(np.float32))


@BOTH
@EACH_SPEC
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [(303, 300), (576, 256), (1, 1), (128, 128)])
def test_quantize_gives_the_reference_s_codes_and_scales(shape, dtype, spec, wrap):
    x = np.asarray(matrix(shape, 0).astype(dtype))
    q = wrap(functools.partial(fp8jax.quantize, spec=spec))(jnp.asarray(x))
    data, scale = quantize_numpy(
        x, spec.tile, dtype=spec.dtype, pow2=spec.scale == "pow2"
    )
    np.testing.assert_array_equal(q.scale, scale)
    same = np.asarray(q.data).view(np.uint8) == data.view(np.uint8)
    # Division by a power of two is exact; else a tie may fall either way.
    assert np.mean(~same) <= (0 if spec.scale == "pow2" else 1e-3)


@EACH_SPEC
@given(**MATRICES)
@settings(deadline=None, max_examples=20)
def test_every_element_is_within_the_error_bound(spec, shape, seed, exponent):
    x = matrix(shape, seed, exponent)
    q = fp8jax.quantize(x, spec)
    scale = np.asarray(q.scale, np.float64)
    scale = np.repeat(np.repeat(scale, spec.tile[0], 0), spec.tile[1], 1)
    scale = scale[: shape[0], : shape[1]]
    exact = np.asarray(x, np.float64)
    error = np.abs(np.asarray(q.data, np.float64) * scale - exact)
    half_ulp, half_subnormal = {
        "float8_e4m3fn": (2.0**-4, 2.0**-10),
        "float8_e5m2": (2.0**-3, 2.0**-17),
    }[str(spec.dtype)]
    # float32 division rounds before the code does: one part in 2^23 more.
    bound = np.maximum(half_ulp * np.abs(exact), half_subnormal * scale)
    assert np.all(error <= bound * (1 + 2.0**-22))
    amax = np.abs(exact).max()
    assert scale.max() * numerics.max_value(spec.dtype) >= amax * (1 - 2.0**-23)


@EACH_SPEC
@given(**MATRICES)
@settings(deadline=None, max_examples=10)
def test_requantizing_the_same_way_is_the_identity(spec, shape, seed, exponent):
    if spec.scale != "pow2":
        spec = fp8jax.QuantSpec(spec.tile, spec.dtype)
    q = fp8jax.quantize(matrix(shape, seed, exponent), spec)
    again = fp8jax.requantize(q, spec)
    # Rounding up to 464 keeps amax within the scale's range, but amax may fall below
    # half of it: then the scale halves and codes double, and the values stay.
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


@given(**MATRICES, shift=st.integers(-20, 20))
@settings(deadline=None, max_examples=20)
def test_scaling_by_a_power_of_two_keeps_the_codes(shape, seed, exponent, shift):
    x = matrix(shape, seed, exponent // 2)
    q, shifted = (fp8jax.quantize(y) for y in (x, x * np.float32(2.0**shift)))
    assert_same_bits(shifted.data, q.data)
    np.testing.assert_array_equal(shifted.scale, q.scale * np.float32(2.0**shift))


@EACH_SPEC
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=5)
def test_changing_one_tile_changes_no_other_byte(spec, seed):
    shape, (tm, tk) = (257, 270), spec.tile
    x = matrix(shape, seed)
    before = fp8jax.quantize(jnp.asarray(x), spec)
    i, j = (-(-s // t) // 2 for s, t in zip(shape, spec.tile, strict=True))
    box = np.s_[i * tm : (i + 1) * tm, j * tk : (j + 1) * tk]
    y = np.array(x)  # Not in place: a JAX array may share x's memory for a while.
    y[box] = -7 * y[box] + 1
    after = fp8jax.quantize(jnp.asarray(y), spec)
    data, scale = (np.asarray(d) for d in (before.data, before.scale))
    changed = data.view(np.uint8) != np.asarray(after.data).view(np.uint8)
    assert changed[box].any()
    changed[box] = False
    assert not changed.any()
    assert list(zip(*np.nonzero(scale != after.scale), strict=True)) == [(i, j)]


def test_128x128_commutes_with_transposition():
    x = matrix((303, 576), 1)
    assert_same_bits(
        fp8jax.quantize(x.T, fp8jax.BLOCK_128X128),
        fp8jax.quantize(x, fp8jax.BLOCK_128X128).T,
    )
    assert_same_bits(
        fp8jax.quantize(x.T, fp8jax.TILE_1X128),
        fp8jax.quantize(x, fp8jax.TILE_128X1).T,
    )


@EACH_SPEC
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_element_makes_its_tile_nan_and_no_other(spec, bad):
    shape = (130, 260)
    quantize = jax.jit(functools.partial(fp8jax.quantize, spec=spec))
    clean = matrix(shape, 2)
    good = np.asarray(quantize(clean).dequantize())
    for r, c in bad_positions(shape):
        x = clean.at[r, c].set(bad)
        values = np.asarray(quantize(x).dequantize())
        (tm, tk), expected = spec.tile, good.copy()
        expected[r // tm * tm : r // tm * tm + tm, c // tk * tk : c // tk * tk + tk] = (
            np.nan
        )
        np.testing.assert_array_equal(values, expected)


@EACH_SPEC
def test_zero_and_subnormal_tiles_are_zero_with_a_usable_scale(spec):
    x = np.zeros((128, 256), np.float32)
    x[:, 128:] = 1e-42  # A float32 subnormal: XLA:CPU takes it for zero.
    q = fp8jax.quantize(jnp.asarray(x), spec)
    assert np.all(np.isfinite(q.scale))
    assert np.all(np.asarray(q.scale) > 0)
    np.testing.assert_array_equal(q.dequantize()[:, :128], 0)
    error = np.abs(np.asarray(q.dequantize(), np.float64) - x)
    assert error.max() <= x.max()


@pytest.mark.parametrize("patterns", [ALL_BF16, ALL_FP16], ids=["bf16", "fp16"])
def test_every_16_bit_pattern_in_a_tile_of_its_own(patterns):
    finite = np.isfinite(patterns.astype(np.float32))
    x = np.zeros((patterns.size, 4), patterns.dtype)
    x[:, 1] = patterns
    q = jax.jit(fp8jax.quantize)(jnp.asarray(x))
    scale, data = np.asarray(q.scale)[:, 0], np.asarray(q.data).astype(np.float32)
    assert np.all(np.isnan(scale) == ~finite)
    values = patterns.astype(np.float32)[finite].astype(np.float64)
    error = np.abs(scale[finite].astype(np.float64) * data[finite, 1] - values)
    # bf16 has float32's subnormals, which may count as zero.
    bound = np.maximum(2.0**-4 * np.abs(values), 2.0**-126)
    assert np.all(error <= bound)


def test_quantizing_inside_jit_is_not_removed_as_excess_precision():
    x = matrix((128, 256), 3)
    fake = jax.jit(lambda x: fp8jax.quantize(x).dequantize())(x)
    assert not np.array_equal(fake, x)
    np.testing.assert_array_equal(fake, fp8jax.quantize(x).dequantize())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_any_float_dtype_is_taken_to_float32(dtype):
    with jax.enable_x64(True):
        x = matrix((5, 130), 4).astype(dtype)
        assert_same_bits(fp8jax.quantize(x), fp8jax.quantize(x.astype(jnp.float32)))


@EACH_SPEC
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
@pytest.mark.parametrize("shape", [(128, 130), (17, 256)])
def test_batch_dimensions_are_matrices_one_by_one(shape, batch, spec):
    x = jnp.stack([matrix(shape, i) for i in range(int(np.prod(batch)))])
    q = fp8jax.quantize(x.reshape(*batch, *shape), spec)
    one_by_one = [fp8jax.quantize(m, spec) for m in x]
    expected = jax.tree.map(
        lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape), *one_by_one
    )
    assert_same_bits(q, expected)
    assert q.dequantize().shape == (*batch, *shape)


@EACH_SPEC
def test_vmap_and_scan_give_the_same_bits(spec):
    x = jnp.stack([matrix((130, 70), i) for i in range(3)])
    quantize = functools.partial(fp8jax.quantize, spec=spec)
    expected = quantize(x)
    assert_same_bits(jax.vmap(quantize)(x), expected)
    assert_same_bits(jax.lax.scan(lambda c, m: (c, quantize(m)), None, x)[1], expected)


@EACH_SPEC
@pytest.mark.parametrize("spec_t", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [(130, 200), (2, 128, 70), (2, 3, 20, 129)])
def test_both_directions_are_the_two_quantizations_bit_for_bit(shape, spec, spec_t):
    x = matrix((int(np.prod(shape[:-1])), shape[-1]), 6).reshape(shape)
    q, q_t = fp8jax.quantize_both(x, spec, spec_t)
    assert_same_bits(q, fp8jax.quantize(x, spec))
    assert_same_bits(q_t, fp8jax.quantize(x.mT, spec_t))
    assert_same_bits(q_t, quant.quantize_transposed(x, spec_t))


def test_both_directions_under_jit_vmap_and_scan():
    x = jnp.stack([matrix((130, 70), i) for i in range(3)])
    expected = fp8jax.quantize_both(x)
    assert_same_bits(jax.jit(fp8jax.quantize_both)(x), expected)
    assert_same_bits(jax.vmap(fp8jax.quantize_both)(x), expected)
    scanned = jax.lax.scan(lambda c, m: (c, fp8jax.quantize_both(m)), None, x)[1]
    assert_same_bits(scanned, expected)


@pytest.mark.parametrize(
    "function",
    [fp8jax.quantize_both, quant.quantize_transposed],
    ids=lambda f: f.__name__,
)
def test_bad_input_of_the_others_is_named_too(function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name} takes a float array, got dtype int3"):
        function(jnp.zeros((4, 128), jnp.int32))
    with pytest.raises(ValueError, match=f"{name} takes a QuantSpec, got 'e4m3'"):
        function(jnp.zeros((4, 128)), "e4m3")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(128, np.float32), r"\[\.\.\., m, k\].*x\.shape=\(128,\)"),
        (np.zeros((0, 128), np.float32), r"at least one element.*\(0, 128\)"),
        (np.zeros((4, 128), np.int32), "float array, got dtype int32"),
        (np.zeros((4, 128), np.complex64), "float array, got dtype complex64"),
    ],
)
def test_bad_arrays_get_an_error_that_says_what_came(x, message):
    with pytest.raises(ValueError, match=f"quantize takes.*{message}"):
        fp8jax.quantize(x)


def test_an_unavailable_implementation_is_refused_and_not_replaced():
    x = matrix((4, 128), 0)
    with pytest.raises(ValueError, match="implementation='triton' is not known"):
        fp8jax.quantize(x, implementation="triton")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match=r"compute capability 9\.0.*cpu"):
            fp8jax.quantize(x, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": (0, 128)}, r"two positive integers, got \(0, 128\)"),
        ({"tile": (1, 2, 3)}, "two positive integers"),
        ({"tile": 128}, "two positive integers"),
        ({"dtype": jnp.bfloat16}, "float8_e4m3fn, float8_e5m2, got"),
        ({"dtype": "nonsense"}, "float8_e4m3fn, float8_e5m2, got"),
        ({"scale": "e8m0"}, "scale='pow2' or 'fp32', got 'e8m0'"),
        ({"eps": -1.0}, "finite eps >= 0"),
    ],
)
def test_bad_specs_get_an_error_that_says_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=f"QuantSpec takes .*{message}"):
        fp8jax.QuantSpec(**fields)


def test_equal_specs_are_equal_however_they_are_spelt():
    a = fp8jax.QuantSpec(tile=[1, 128], dtype="float8_e4m3fn")
    assert a == fp8jax.TILE_1X128
    assert hash(a) == hash(fp8jax.TILE_1X128)


@pytest.mark.parametrize(
    ("kind", "spread", "least", "most", "median", "worst"),
    [
        ("pow2", 0, 0, 1e-6, (0, 1e-6), (0, 1e-5)),
        ("pow2", 4, 0, 2e-6, (0, 1e-5), (0, 1e-3)),
        ("pow2", 12, 1e-7, 1e-5, (1e-3, 2e-2), (0.9, 1)),
        ("fp32", 0, 0.02, 0.03, (0.02, 0.03), (0.02, 0.04)),
        ("fp32", 4, 0.02, 0.03, (0.02, 0.03), (0.02, 0.04)),
    ],
)
def test_requantizing_along_the_other_side_loses_what_underflows(
    kind, spread, least, most, median, worst
):
    # Codes keep their mantissas under powers of two, and small rows their tiles' floor.
    rng = np.random.default_rng(0)
    rows = np.exp2(rng.integers(-spread, spread + 1, (512, 1)))
    x = jnp.asarray(rng.normal(size=(512, 512)) * rows, jnp.float32)
    q = fp8jax.quantize(x, fp8jax.QuantSpec((1, 128), scale=kind))
    again = fp8jax.requantize(q, fp8jax.QuantSpec((128, 1), scale=kind))
    values, others = (np.asarray(a.dequantize(), np.float64) for a in (q, again))
    lost = np.linalg.norm(others - values, axis=1) / np.linalg.norm(values, axis=1)
    whole = np.linalg.norm(others - values) / np.linalg.norm(values)
    assert least <= whole <= most
    assert median[0] <= np.median(lost) <= median[1]
    assert worst[0] <= lost.max() <= worst[1]


@EACH_DIVISION
def test_float32_scales_move_a_code_by_a_step_at_most(wrap, repeats):
    # Values at the middle between two codes, times a scale that is no power of two.
    rng = np.random.default_rng(0)
    spec = fp8jax.QuantSpec((1, 128), scale="fp32")
    codes = np.arange(1, 0x7E, dtype=np.uint8).view(jnp.float8_e4m3fn)
    codes = codes.astype(np.float64)
    middles = (codes[1:] + codes[:-1]) / 2
    x = np.zeros((500, 128), np.float32)
    x[:, 0] = amax = rng.uniform(1, 2, 500).astype(np.float32)
    scale = (amax * np.float32(1 / 448)).astype(np.float64)
    count = 1 if repeats else 127
    picked = rng.choice(middles[:-1], (500, count))
    x[:, 1:] = (picked * scale[:, None]).astype(np.float32)
    q = wrap(lambda x: fp8jax.quantize(x, spec))(jnp.asarray(x))
    data, scales = quantize_numpy(x, spec.tile, pow2=False)
    np.testing.assert_array_equal(q.scale, scales)
    steps = np.abs(
        np.asarray(q.data).view(np.uint8).astype(int) - data.view(np.uint8).astype(int)
    )
    assert steps.max() <= 1
    # By powers of two no code moves.
    q = wrap(fp8jax.quantize)(jnp.asarray(x))
    data, scales = quantize_numpy(x, (1, 128))
    np.testing.assert_array_equal(q.scale, scales)
    np.testing.assert_array_equal(
        np.asarray(q.data).view(np.uint8), data.view(np.uint8)
    )


def test_scales_are_deepseek_s_to_an_ulp_and_its_powers_of_two():
    # Its files' are amax / 448 rounded once.
    rng = np.random.default_rng(0)
    amax = np.ldexp(rng.uniform(1, 2, 100_000), rng.integers(-100, 100, 100_000))
    amax = np.concatenate([amax, np.ldexp(7.0, np.arange(-100, 100))])
    amax = amax.astype(np.float32)
    theirs = amax / np.float32(448)
    ours = numerics.scale_from_amax(amax, jnp.float8_e4m3fn, "fp32")
    apart = np.abs(ours.view(np.int32) - theirs.view(np.int32))
    assert apart.max() == 1
    # Measured: 0.55. That both occur often is the point.
    assert 0.4 < apart.mean() < 0.6
    np.testing.assert_array_equal(
        numerics.scale_from_amax(amax, jnp.float8_e4m3fn, "pow2"),
        numerics.round_up_pow2(theirs),
    )


def test_float32_subnormals_may_count_as_zero():
    smallest = np.float32(2.0**-126)
    x = jnp.full((1, 128), smallest / 2).at[0, 0].set(2.0**-120)
    q = fp8jax.quantize(x)
    assert q.scale == smallest
    np.testing.assert_array_equal(q.data[0, :1], [64.0])
    assert set(np.asarray(q.data[0, 1:], np.float32)) <= {0.0, 0.5}
