"""A band of rows quantized on a CPU, and what that cost it.

In NumPy: Python with JAX takes 170 MB, XLA's compiler 50 more whatever it compiles, and
offline quantization has 200. That costs up to a quarter more time. E4M3 is rounded by
float32 arithmetic: a cast of ml_dtypes takes two to four times as long as all of this,
and keeps other threads from running.

Invariant: with power-of-two scales the bits of `fp8jax.quantize`, to E4M3. By others
XLA does not divide as IEEE says: a code of `quantize` may lie a step from this one,
where the quotient is at a tie.
"""

import itertools
import math
import threading
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fp8jax import numerics
from fp8jax.quant import QuantSpec

_E4M3 = np.dtype(jnp.float8_e4m3fn)
# Of a row of tiles at once. With half of them two threads take 10 % more time, with a
# quarter 39 %: they wait for Python's lock.
_PIECE_COLUMNS = 4096

_DROPPED = 23 - 3  # Bits of float32's mantissa that E4M3 has not.
_SPLITTER = np.float32(2**_DROPPED + 1)
_BIAS = (127 - 7) << 3  # Between the two exponents, above E4M3's mantissa.
_FIRST_NORMAL, _LAST = 0x08, 0x7E  # Codes of 2^-6 and of 448.
_NAN = np.uint8(0x7F)
_SMALLEST = np.float32(2.0**-9)  # What code 1 stands for: float32's last place at
_LAST_PLACE = np.float32(2.0**14)


class Band(NamedTuple):
    """Rows of a weight in FP8.

    Attributes:
        codes: E4M3 `[m, k]`.
        scale: float32 `[m_tiles, k_tiles]`.
        error: sum of the squares of `codes * scale - x`.
        signal: sum of the squares of x.
    """

    codes: np.ndarray
    scale: np.ndarray
    error: float
    signal: float


class _Scratch(NamedTuple):
    """float32 arrays of whole tiles `[tm, columns]`, which a thread keeps.

    Fresh memory would cost as much as the arithmetic.
    """

    quotient: np.ndarray  # Of x and its scale.
    value: np.ndarray  # The quotient, rounded.
    other: np.ndarray


_thread = threading.local()


def quantize_band(x: np.ndarray, spec: QuantSpec) -> Band:
    """`quantize(x, spec)`, and the sums of squares of its error and of x.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`.
        spec: of E4M3.
    """
    assert spec.dtype == _E4M3
    (m, k), (tm, tk) = x.shape, spec.tile
    codes = np.empty((m, k), np.uint8)
    scale = np.empty(numerics.scale_shape((m, k), spec.tile), np.float32)
    error = signal = 0.0
    width = tk * max(1, _PIECE_COLUMNS // tk)
    with np.errstate(all="ignore"):  # NaN and infinity are told of by their tiles.
        for row, column in itertools.product(range(0, m, tm), range(0, k, width)):
            rows, columns = slice(row, row + tm), slice(column, column + width)
            part = x[rows, columns]
            tiles = -(-part.shape[1] // tk)
            scratch = _scratch((tm, tiles * tk))
            factor = _scale_of(part, tiles, spec, scratch.other)
            _widen(part, scratch.quotient)
            np.divide(scratch.quotient, np.repeat(factor, tk), out=scratch.quotient)
            made = _round_to_e4m3(scratch)
            codes[rows, columns] = made[: part.shape[0], : part.shape[1]]
            scale[row // tm, column // tk : column // tk + tiles] = factor
            squared = np.square(factor, dtype=np.float64)
            signal += float(_square_sums(scratch.quotient, tk) @ squared)
            off = np.subtract(scratch.value, scratch.quotient, out=scratch.value)
            error += float(_square_sums(off, tk) @ squared)
    return Band(codes.view(_E4M3), scale, error, signal)


def _scratch(shape: tuple[int, int]) -> _Scratch:
    size = math.prod(shape)
    if getattr(_thread, "size", 0) < size:
        _thread.size = size
        _thread.arrays = [np.empty(size, np.float32) for _ in _Scratch._fields]
    return _Scratch(*(array[:size].reshape(shape) for array in _thread.arrays))


def _widen(part: np.ndarray, x: np.ndarray) -> None:
    """Fills x with at most as many rows and columns, and with zeros beyond them."""
    if part.shape != x.shape:
        x[...] = 0
    inside = x[: part.shape[0], : part.shape[1]]
    if part.dtype == jnp.bfloat16:  # Faster than a cast, and without Python's lock.
        np.left_shift(part.view(np.uint16), np.uint32(16), out=inside.view(np.uint32))
    else:
        inside[...] = part


def _scale_of(
    part: np.ndarray, tiles: int, spec: QuantSpec, scratch: np.ndarray
) -> np.ndarray:
    """Of each tile in a row of them."""
    # The largest magnitude by its bits: NaN > inf > finite. Down the rows first, which
    # is vectorized best.
    bits = part.view(f"i{part.itemsize}")
    magnitude = scratch.view(bits.dtype).ravel()[: part.size].reshape(part.shape)
    np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=magnitude)
    largest = magnitude.max(axis=0)
    if beyond := tiles * spec.tile[1] - len(largest):
        largest = np.append(largest, np.zeros(beyond, bits.dtype))
    largest = largest.reshape(tiles, -1).max(axis=1)
    amax = largest.view(part.dtype).astype(np.float32)
    return numerics.scale_from_amax(amax, spec.dtype, spec.scale, spec.eps)


def _round_to_e4m3(scratch: _Scratch) -> np.ndarray:
    """The codes of `quotient`, uint8, in the place of `other`; and their values.

    No clip: what division's rounding leaves above 448 is rounded to it.
    """
    quotient, value, other = scratch
    # To four bits of the mantissa, nearest, ties to even: Veltkamp's splitting (Dekker,
    # Numerische Mathematik 18, 1971).
    np.multiply(quotient, _SPLITTER, out=value)
    rest = np.subtract(value, quotient, out=other)
    np.subtract(value, rest, out=value)
    # Arrays of two bytes, one and one an element, in the place of one of four.
    upper, ones = other.view(np.uint16).reshape(2, *other.shape)
    code, sign = ones.view(np.uint8).reshape(2, *other.shape)
    bits = value.view(np.uint32)
    np.right_shift(bits, np.uint32(_DROPPED), out=upper, casting="unsafe")
    np.right_shift(upper, np.uint16(4), out=sign, casting="unsafe")
    sign &= np.uint8(0x80)
    upper &= np.uint16(0x7FF)  # Exponent and mantissa.
    upper -= np.uint16(_BIAS)
    np.copyto(code, upper, casting="unsafe")
    code |= sign

    # Subnormals and NaN, few as a rule. What wraps around is large, too.
    upper -= np.uint16(_FIRST_NORMAL)
    is_other = np.greater(upper, _LAST - _FIRST_NORMAL, out=sign.view(np.bool_))
    others = np.flatnonzero(is_other)
    few = quotient.ravel()[others]
    # The sum's last bits count the smallest subnormals; 8 of them are 2^-6's code, too.
    count = (np.abs(few) + _LAST_PLACE).view(np.uint32) & np.uint32(0xF)
    magnitude = np.where(np.isnan(few), _NAN, count.astype(np.uint8))
    code.ravel()[others] = magnitude | np.signbit(few) * np.uint8(0x80)
    small = np.where(np.isnan(few), few, count.astype(np.float32) * _SMALLEST)
    value.ravel()[others] = np.copysign(small, few)
    return code


def _square_sums(x: np.ndarray, tk: int) -> np.ndarray:
    """Of each tile in a row of them: float32 along the rows, float64 down them."""
    rows = x.reshape(len(x), -1, tk)
    return np.vecdot(rows, rows).sum(axis=0, dtype=np.float64)
