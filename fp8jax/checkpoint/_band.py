"""A band of rows quantized on a CPU, and what that cost it, in three reads of it.

Invariant: codes and scales are the bits of `fp8jax.quantize`, to E4M3.
"""

import functools

import jax
import jax.numpy as jnp

from fp8jax import numerics
from fp8jax.quant import QTensor, QuantSpec


@functools.partial(jax.jit, static_argnames="spec")
def quantize_band(
    x: jax.Array, spec: QuantSpec
) -> tuple[QTensor, jax.Array, jax.Array]:
    """`quantize(x, spec)`, and the sums of squares of its error and of x.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`.
        spec: of E4M3.
    """
    assert spec.dtype == jnp.float8_e4m3fn
    tiles = numerics.split_tiles(x, spec.tile).astype(jnp.float32)  # [mt, tm, kt, tk]
    amax = numerics.integer_amax(tiles, axes=(1, 3))
    scale = numerics.scale_from_amax(amax, spec.dtype, spec.scale, spec.eps)
    quotient = numerics.clipped_quotient(tiles, scale, spec.dtype)
    codes = numerics.join_tiles(numerics.encode_e4m3(quotient), x.shape)
    # The codes' values are made again from x, which is less work than to decode them.
    value = numerics.join_tiles(numerics.round_to_e4m3(quotient) * scale, x.shape)
    exact = x.astype(jnp.float32)
    # Down the rows first: XLA:CPU vectorizes that sum, and one across it does not.
    error = jnp.sum(jnp.square(value - exact), axis=0)
    signal = jnp.sum(jnp.square(exact), axis=0)
    return (
        QTensor(codes, scale[:, 0, :, 0], spec.tile),
        jnp.sum(error),
        jnp.sum(signal),
    )
