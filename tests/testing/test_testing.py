"""The oracles agree with values worked out by hand, and the assertions can fail."""

import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import testing


def test_quantize_numpy_on_a_tile_worked_out_by_hand():
    x = np.zeros((1, 130), np.float32)
    # amax 900 / 448 is just over 2: the scale is 4. 900 / 4 = 225 lies between 224 and
    # 240; 3 / 4 is a code; 7.4 / 4 = 1.85 rounds to 1.875; the last tile is zero.
    x[0, :3] = 900, 3, 7.4
    data, scale = testing.quantize_numpy(x, (1, 128))
    np.testing.assert_array_equal(scale, [[4, 1]])
    np.testing.assert_array_equal(data[0, :4].astype("f"), [224, 0.75, 1.875, 0])
    _, exact = testing.quantize_numpy(x, (1, 128), pow2=False)
    np.testing.assert_array_equal(exact[0, 0], np.float32(900) * np.float32(1 / 448))


@pytest.mark.parametrize(("amax", "scale"), [(448, 1), (449, 2), (447, 1), (224, 0.5)])
def test_quantize_numpy_rounds_powers_of_two_up(amax, scale):
    x = np.full((1, 1), amax, np.float32)
    assert testing.quantize_numpy(x, (1, 128))[1] == scale


def test_gemm_float64_on_a_product_worked_out_by_hand():
    lhs, rhs = np.ones((1, 130)), np.full((2, 130), 2.0)
    out = testing.gemm_float64(
        lhs,
        np.asarray([[3.0, 5.0]]),
        rhs,
        np.asarray([[7.0, 11.0]]),
        lhs_tile=(1, 128),
        rhs_tile=(128, 128),
    )
    np.testing.assert_array_equal(out, [[128 * 2 * 21 + 2 * 2 * 55] * 2])


def test_distinct_scales_are_distinct_and_no_powers_of_two():
    scales = testing.distinct_scales(np.random.default_rng(0), (9, 56))
    assert len(np.unique(scales)) == scales.size
    assert not np.any(np.frexp(scales)[0] == 0.5)


def test_random_codes_are_finite_and_of_every_exponent():
    codes = testing.random_codes(np.random.default_rng(0), (64, 128))
    values = codes.astype("f")
    assert np.isfinite(values).all()
    assert len(np.unique(np.frexp(values[values != 0])[1])) == 18


def test_assert_same_bits_sees_a_sign_of_zero_and_a_dtype():
    zero = jnp.zeros(3)
    testing.assert_same_bits({"a": zero}, {"a": zero})
    with pytest.raises(AssertionError, match="'a'"):
        testing.assert_same_bits({"a": zero}, {"a": -zero})
    with pytest.raises(AssertionError, match="is not bfloat16"):
        testing.assert_same_bits(zero, zero.astype(jnp.bfloat16))
    with pytest.raises(AssertionError):
        testing.assert_same_bits([zero], (zero,))


def test_assert_product_sees_one_wrong_element():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 128), "f"))
    q = fp8jax.quantize(x)
    out = fp8jax.scaled_matmul(q, q, out_dtype=jnp.float32)
    testing.assert_product_within_float32(out, q, q)
    with pytest.raises(AssertionError, match=r"element \(3, 4\) is off by"):
        testing.assert_product_within_float32(out.at[3, 4].add(0.01), q, q)


def test_codes_that_differ_by_more_than_last_bits_are_found():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 128), np.float32))
    q = fp8jax.quantize(x)
    check = testing.assert_codes_differ_by_last_bits
    check(q, q)
    check(fp8jax.quantize(x * np.float32(1 + 2.0**-22)), q)
    with pytest.raises(AssertionError):
        check(fp8jax.quantize(x * np.float32(1.02)), q)
    with pytest.raises(AssertionError):
        check(fp8jax.quantize(x.at[3, 4].set(jnp.nan)), q)
    with pytest.raises(AssertionError):
        check(fp8jax.quantize(x.at[3, 4].multiply(-1)), q)
