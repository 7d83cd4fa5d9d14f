"""The FP8 formats of the OCP specification that training uses.

`float8_e4m3fn`: largest finite value 448, smallest normal 2^-6, smallest subnormal
2^-9, no infinity, two NaN codes. `float8_e5m2`: 57344, 2^-14, 2^-16, with infinities.
Neither has a zero point: quantization is symmetric.
"""

import jax
import jax.numpy as jnp
import numpy as np

FP8_DTYPES: tuple[np.dtype, ...] = (
    np.dtype(jnp.float8_e4m3fn),
    np.dtype(jnp.float8_e5m2),
)


def is_fp8(dtype: jax.typing.DTypeLike) -> bool:
    """Whether `dtype` is one of the formats this library quantizes to."""
    return np.dtype(dtype) in FP8_DTYPES


def max_value(dtype: jax.typing.DTypeLike) -> float:
    """The largest finite value of `dtype`: 448 for E4M3, 57344 for E5M2."""
    return float(jnp.finfo(dtype).max)
