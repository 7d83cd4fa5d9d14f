"""RMS normalization, quantized, in `jnp`."""

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
    normal = values * inverse[:, None] * weight.astype(jnp.float32)
    h = numerics.round_to(normal, x.dtype)
    return quantize(h, tile=tile, dtype=dtype, scale=scale, eps=eps), inverse
