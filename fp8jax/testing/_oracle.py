"""Independent references, in NumPy: float64 and ml_dtypes, no JAX."""

import math

import ml_dtypes
import numpy as np


def quantize_numpy(
    x: np.ndarray,
    tile: tuple[int, int],
    *,
    dtype=ml_dtypes.float8_e4m3fn,
    pow2: bool = True,
    eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes tile by tile: codes `[m, k]` and float32 scales `[m_tiles, k_tiles]`.

    Written as the definition reads, one tile at a time. float32 subnormals count as
    they are, not as zero.
    """
    m, k = x.shape
    tm, tk = tile
    x = x.astype(np.float32)
    limit = float(ml_dtypes.finfo(dtype).max)
    inverse = np.float32(1.0 / limit)
    data = np.zeros((m, k), dtype)
    scale = np.zeros((-(-m // tm), -(-k // tk)), np.float32)
    for i, j in np.ndindex(scale.shape):
        box = np.s_[i * tm : (i + 1) * tm, j * tk : (j + 1) * tk]
        scale[i, j] = _tile_scale(np.abs(x[box]).max(), inverse, pow2, eps)
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.clip(x[box] / scale[i, j], -limit, limit)  # Keeps NaN.
        data[box] = t.astype(dtype)
    return data, scale


def _tile_scale(
    amax: np.float32, inverse: np.float32, pow2: bool, eps: float
) -> np.float32:
    if not np.isfinite(amax):
        return np.float32(np.nan)
    if amax == 0:
        return np.float32(1)
    scale = max(max(amax, np.float32(eps)) * inverse, np.float32(2.0**-126))
    if not pow2:
        return np.float32(scale)
    mantissa, exponent = math.frexp(float(scale))  # scale = mantissa * 2^exponent
    return np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def gemm_float64(
    lhs: np.ndarray,
    lhs_scale: np.ndarray,
    rhs: np.ndarray,
    rhs_scale: np.ndarray,
    *,
    lhs_tile: tuple[int, int],
    rhs_tile: tuple[int, int],
) -> np.ndarray:
    """`[m, k]` times `[n, k]` transposed in float64, `[m, n]`.

    A chunk's products and sums are exact: at most 43 significant bits.
    """
    left, right = (
        np.repeat(np.repeat(scale, tile[0], 0), tile[1], 1)[: x.shape[0], : x.shape[1]]
        * x.astype(np.float64)
        for x, scale, tile in ((lhs, lhs_scale, lhs_tile), (rhs, rhs_scale, rhs_tile))
    )
    return left @ right.T
