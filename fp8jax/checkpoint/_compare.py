"""What a checkpoint's codes look like, and how two checkpoints differ."""

import dataclasses
import math
import os
from collections.abc import Iterator

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._offline import band_values, sqnr_of
from fp8jax.checkpoint._quantized import whole
from fp8jax.checkpoint._reader import Reader
from fp8jax.checkpoint._stream import bands

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a tensor of one checkpoint differs from its namesake in another.

    Attributes:
        name: in both files, or in one.
        what: `"same bits"`, `"same values"`, `"differs"`, `"other shape"`,
            `"only in the first"` or `"only in the second"`.
        sqnr_db: of the second's values against the first's, where values differ.
        largest: magnitude among the differences of values.
    """

    name: str
    what: str
    sqnr_db: float | None = None
    largest: float | None = None


def code_histogram(reader: Reader, name: str) -> np.ndarray:
    """How often each of the 256 codes occurs in an FP8 weight, int64 `[256]`.

    Raises:
        ValueError: If the tensor is not FP8.
    """
    codes = reader.codes(name)
    if not numerics.is_fp8(codes.dtype):
        raise ValueError(f"code_histogram takes an FP8 weight, got {codes.dtype}.")
    counts = np.zeros(256, np.int64)
    flat = codes.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(flat[start : start + _CHUNK], minlength=256)
        reader.release(name)
    return counts


def diff(first: str | os.PathLike, second: str | os.PathLike) -> list[Difference]:
    """Compares two checkpoints tensor by tensor, FP8 weights by `codes * scale`.

    Args:
        first, second: as in `Reader`.

    Returns:
        A Difference for each name in either.

    Raises:
        CheckpointError, OSError: As `Reader` does.
        ValueError: If one has tensors of other formats.
    """
    a, b = Reader(first), Reader(second)
    for reader in (a, b):
        whole("diff", reader)
    return [_difference(a, b, name) for name in dict.fromkeys((*a, *b))]


def _difference(a: Reader, b: Reader, name: str) -> Difference:
    if name not in b:
        return Difference(name, "only in the first")
    if name not in a:
        return Difference(name, "only in the second")
    if a[name].stored.shape != b[name].stored.shape:
        return Difference(name, "other shape")
    same_kind = (a[name].stored.dtype, a[name].tile) == (
        b[name].stored.dtype,
        b[name].tile,
    )
    same_bits, error, signal, largest = same_kind, 0.0, 0.0, 0.0
    if same_kind and a[name].scale is not None:
        same_bits = a.scale(name).tobytes() == b.scale(name).tobytes()
    for x, y, same_codes in _pieces(a, b, name):
        same_bits &= same_codes
        off = _off(x, y)
        x = x.astype("f8")
        error += float(np.sum(off**2))
        signal += float(np.sum(x**2))
        # Not max: it must not lose a NaN that one side alone has.
        largest = float(np.maximum(largest, np.max(np.abs(off), initial=0.0)))
    if same_bits:
        return Difference(name, "same bits")
    if largest == 0:
        return Difference(name, "same values")
    return Difference(name, "differs", sqnr_of(error, signal), largest)


def _off(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`y - x` in float64, zero where they are equal, or NaN both, and nowhere else."""
    wide = [v.astype("f8") for v in (x, y)]
    # Integers beyond 2^53 are compared as they are.
    whole = all(v.dtype.kind in "iub" for v in (x, y))
    equal = x == y if whole else wide[0] == wide[1]
    with np.errstate(invalid="ignore"):
        off = wide[1] - wide[0]
    off = np.where(off == 0, 1.0, off)
    return np.where(equal | (np.isnan(wide[0]) & np.isnan(wide[1])), 0.0, off)


def _pieces(
    a: Reader, b: Reader, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Values of both, and whether what is stored is the same bytes."""
    shape = a[name].stored.shape
    if len(shape) < 2:
        x, y = a.codes(name), b.codes(name)
        yield x, y, x.tobytes() == y.tobytes()
        return
    # Bands of whole tiles of both.
    rows_of = [reader[name].tile or (1, 1) for reader in (a, b)]
    tile = (math.lcm(rows_of[0][0], rows_of[1][0]), 1)
    for matrix, rows in bands(shape, tile):
        stored = [
            reader.codes(name).reshape(-1, *shape[-2:])[matrix, rows]
            for reader in (a, b)
        ]
        x, y = (
            codes
            if reader[name].tile is None
            else np.asarray(band_values(reader, name, matrix, rows, "float32"))
            for reader, codes in zip((a, b), stored, strict=True)
        )
        same = stored[0].tobytes() == stored[1].tobytes()
        yield x, y, same
        a.release(name)
        b.release(name)
