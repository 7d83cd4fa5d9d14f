"""Arrays on which a wrong quantizer or GEMM shows."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

# Every 16-bit pattern: both zeros, subnormals, all normals, infinities and NaNs.
_PATTERNS = np.arange(1 << 16, dtype=np.uint16)
ALL_BF16: np.ndarray = _PATTERNS.view(ml_dtypes.bfloat16)
ALL_FP16: np.ndarray = _PATTERNS.view(np.float16)


def random_codes(
    rng: np.random.Generator, shape: tuple[int, ...], dtype=ml_dtypes.float8_e4m3fn
) -> np.ndarray:
    """FP8 codes drawn evenly from all finite ones: every exponent is there."""
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    finite = codes[np.isfinite(codes.astype(np.float32))]
    return rng.choice(finite, shape)


def distinct_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Positive float32 scales, no two alike, so that a misplaced one shows.

    They are odd integers over 2^12, so neither are they powers of two.
    """
    odd = 2 * rng.permutation(int(np.prod(shape))) + 3
    return (odd.astype(np.float32) / np.float32(4096)).reshape(shape)


def positive_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [0, 1): sums grow, so that a GEMM without promotion shows."""
    return rng.random(shape, dtype=np.float32)


def lognormal_tokens(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """float32 activations whose tokens differ in size, with outlier channels."""
    x = rng.standard_normal(shape, dtype=np.float32)
    x *= rng.lognormal(sigma=1.0, size=(shape[0], 1)).astype(np.float32)
    x[:, rng.choice(shape[1], max(1, shape[1] // 100), replace=False)] *= 30
    return x


def bad_positions(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Places for a single NaN or infinity: corners, tile borders and the middle."""
    m, k = shape
    rows = {0, m // 2, m - 1, *(r for r in (127, 128) if r < m)}
    columns = {0, k // 2, k - 1, *(c for c in (127, 128) if c < k)}
    return ((r, c) for r in sorted(rows) for c in sorted(columns))
