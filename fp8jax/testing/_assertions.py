"""Assertions with a tolerance that comes from an argument."""

from typing import Any

import jax
import numpy as np

from fp8jax.quant import QTensor
from fp8jax.testing._oracle import gemm_float64

_FLOAT32_ROUNDOFF = 2.0**-24


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two trees of arrays hold the same bits, of the same shapes and dtypes.

    Raises:
        AssertionError: Naming the first leaf that differs, and where.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    )
    for (path, a), e in pairs:
        a, e = np.asarray(a), np.asarray(e)
        where = f"leaf {jax.tree_util.keystr(path) or '(root)'}"
        assert a.dtype == e.dtype, f"{where}: {a.dtype} is not {e.dtype}"
        bits = f"u{a.dtype.itemsize}"
        np.testing.assert_array_equal(a.view(bits), e.view(bits), err_msg=where)


def assert_product_within_float32(out: Any, lhs: QTensor, rhs: QTensor) -> None:
    """`out [m, n]` is `lhs [m, k]` times `rhs [n, k]` transposed, summed in float32.

    A sum of k float32 terms, in any order, is off by at most `k 2^-24` of the sum of
    the terms' magnitudes; the two scales and their products add three roundings.

    Raises:
        AssertionError: Where an element is further from the float64 product.
    """
    expected, magnitude = (
        gemm_float64(
            of(np.asarray(lhs.data).astype(np.float64)),
            np.asarray(lhs.scale),
            of(np.asarray(rhs.data).astype(np.float64)),
            np.asarray(rhs.scale),
            lhs_tile=lhs.tile,
            rhs_tile=rhs.tile,
        )
        for of in (np.asarray, np.abs)
    )
    bound = (lhs.shape[1] + 3) * _FLOAT32_ROUNDOFF * magnitude
    error = np.abs(np.asarray(out, np.float64) - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert np.all(error <= bound), (
        f"element {tuple(map(int, worst))} is off by {error[worst]:.3g}, allowed "
        f"{bound[worst]:.3g}; {np.mean(error > bound):.1%} are"
    )


def assert_codes_differ_by_last_bits(actual: Any, expected: Any) -> None:
    """Two trees of codes and float32 scales, of values that differ in their last bits.

    A value that is off by some ulps of float32 lies on the other side of a tie now and
    then: its code moves by a step. So does a scale, by an ulp of a 16-bit amax, or to
    another power of two and all its codes with it. Two in a thousand may.

    Raises:
        AssertionError: If more do, one moves further, or a NaN has no NaN beside it.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        step = 0.0 if a.dtype.itemsize == 1 else 2.0**-7
        smallest = 2.0**-6 if a.dtype.itemsize == 1 else 2.0**-126
        a, e = np.asarray(a).astype(np.float32), np.asarray(e).astype(np.float32)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
        with np.errstate(invalid="ignore"):
            off = np.abs(a - e) / np.maximum(np.abs(e), smallest)
        off = np.where((a == e) | np.isnan(e), 0, off)
        assert np.max(off) <= 1
        assert np.sum(off > step) <= max(1, 2e-3 * off.size)
