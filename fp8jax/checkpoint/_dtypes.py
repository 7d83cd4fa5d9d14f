"""What safetensors calls its dtypes, and what NumPy (with ml_dtypes) calls them."""

import ml_dtypes
import numpy as np

FROM_CODE: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
TO_CODE: dict[np.dtype, str] = {dtype: code for code, dtype in FROM_CODE.items()}

E8M0: np.dtype = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16: np.dtype = np.dtype(ml_dtypes.bfloat16)

# What scales may be stored as; all are exact in float32. uint8 holds e8m0's bits.
SCALE_DTYPES: tuple[np.dtype, ...] = (
    np.dtype(np.float32),
    BF16,
    np.dtype(np.float16),
    E8M0,
    np.dtype(np.uint8),
)


def scale_to_float32(scale: np.ndarray) -> np.ndarray:
    """Stored scales as the float32 multipliers that they are, exactly.

    e8m0 code `b` is `2**(b - 127)`, and 255 is NaN. `b = 0` is a float32 subnormal.
    """
    if scale.dtype == E8M0 or scale.dtype == np.uint8:
        exponent = scale.view(np.uint8).astype(np.uint32)
        bits = np.where(exponent == 0, np.uint32(1 << 22), exponent << np.uint32(23))
        bits = np.where(exponent == 255, np.uint32(0x7FC00000), bits)
        return bits.astype(np.uint32).view(np.float32)
    return scale.astype(np.float32)


def scale_to_e8m0(scale: np.ndarray, name: str) -> np.ndarray:
    """float32 powers of two (or NaN) as e8m0; ValueError, naming `name`, for others."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        stored = scale.astype(E8M0)
    if not np.array_equal(scale_to_float32(stored), scale, equal_nan=True):
        raise ValueError(
            f"{name} has scales that are no powers of two, which ue8m0 cannot hold: "
            'quantize with scale="pow2", or store float32 scales.'
        )
    return stored
