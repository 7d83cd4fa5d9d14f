"""RMS normalization, quantized, in `jnp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import numerics
from fp8jax.kernels._contract import Quantized
from fp8jax.kernels.xla._quantize import quantize


def quantize_rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    epsilon: float,
    tile: numerics.Tile,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> tuple[Quantized, jax.Array]:
    """FP8 of `x / rms(x) * weight`; see `fp8jax.kernels.QuantizeRmsNorm`."""
    values = x.astype(jnp.float32)
    total = jnp.sum(values * values, axis=1)
    inverse = lax.rsqrt(total * jnp.float32(1 / x.shape[1]) + jnp.float32(epsilon))
    inverse = jnp.where(total < jnp.inf, inverse, jnp.float32(jnp.nan))
    normal = values * inverse[:, None] * weight.astype(jnp.float32)[None]
    h = numerics.round_to(normal, x.dtype)
    return quantize(h, tile=tile, dtype=dtype, scale=scale, eps=eps), inverse


def quantize_add_rms_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, **how: Any
) -> tuple[Quantized, jax.Array, jax.Array]:
    """FP8 of the sum, normalized; see `fp8jax.kernels.QuantizeAddRmsNorm`."""
    # NOTE: XLA may keep a sum of 16-bit numbers in float32 for what reads it next.
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    total = numerics.round_to(total, x.dtype)
    return *quantize_rms_norm(total, weight, **how), total
