"""1d2d: lhs in 1x128 tiles, rhs in 128x128 tiles (fprop and dgrad)."""

import jax
import jax.numpy as jnp

from fp8jax.kernels.mosaic_gpu._common import num_sms, zero_pad
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig, gemm_1d2d_config
from fp8jax.kernels.mosaic_gpu._gemm_kernel import (
    COLUMN_MULTIPLE,
    ROW_MULTIPLE,
    gemm_padded,
)


def gemm_1d2d(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: GemmConfig | None = None,
) -> jax.Array:
    """`lhs [m, k]` times `rhs [n, k]` transposed: see `gemm`.

    Args:
        lhs: FP8 [m, k].
        lhs_scale: float32 [m, ceil(k / 128)].
        rhs: FP8 [n, k].
        rhs_scale: float32 [ceil(n / 128), ceil(k / 128)].
        out_dtype: bfloat16 or float32.
        config: the block shape; None chooses by shape.
    """
    (m, k), n = lhs.shape, rhs.shape[0]
    sms = num_sms()
    config = config or gemm_1d2d_config(m, n, k, sms)
    out = gemm_padded(
        zero_pad(lhs, (ROW_MULTIPLE, CHUNK)),
        # The quantization kernel writes [k / 128, m]: XLA cancels the transposes.
        zero_pad(lhs_scale.astype(jnp.float32).T, (1, ROW_MULTIPLE)),
        zero_pad(rhs, (COLUMN_MULTIPLE, CHUNK)),
        rhs_scale.astype(jnp.float32),
        out_dtype=out_dtype,
        config=config,
        num_sms=sms,
        rhs_scale_rows=False,
    )
    return out[:m, :n]
