"""A band of rows quantized on a CPU, and what that cost it.

Invariant: codes and scales are the bits of `fp8jax.quantize`, to E4M3.
"""

import functools

import jax
import jax.numpy as jnp

from fp8jax import numerics
from fp8jax.quant import QTensor, QuantSpec


def quantize_band(
    x: jax.Array, spec: QuantSpec
) -> tuple[QTensor, jax.Array, jax.Array]:
    """`quantize(x, spec)`, and the sums of squares of its error and of x.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`.
        spec: of E4M3.
    """
    q, error = _codes_and_error(x, spec)
    # Two programs: in one, XLA:CPU makes the error once more inside its sum, in a loop
    # that it does not vectorize, which takes longer than all the rest.
    return q, *_square_sums(error, x)


@functools.partial(jax.jit, static_argnames="spec")
def _codes_and_error(x: jax.Array, spec: QuantSpec) -> tuple[QTensor, jax.Array]:
    assert spec.dtype == jnp.float8_e4m3fn
    tiles = numerics.split_tiles(x, spec.tile).astype(jnp.float32)  # [mt, tm, kt, tk]
    # Down the rows first, here and below: XLA:CPU vectorizes that, across it does not.
    amax = numerics.integer_amax(numerics.integer_amax(tiles, axes=(1,)), axes=(3,))
    scale = numerics.scale_from_amax(amax, spec.dtype, spec.scale, spec.eps)
    quotient = numerics.clipped_quotient(tiles, scale, spec.dtype)
    codes = numerics.join_tiles(numerics.encode_e4m3(quotient), x.shape)
    # The codes' values are made again from x, which is less work than to decode them.
    value = numerics.join_tiles(numerics.round_to_e4m3(quotient) * scale, x.shape)
    error = value - x.astype(jnp.float32)
    return QTensor(codes, scale[:, 0, :, 0], spec.tile), error


@jax.jit
def _square_sums(error: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
    sides = error, x.astype(jnp.float32)
    return tuple(jnp.sum(jnp.sum(jnp.square(side), axis=0)) for side in sides)
