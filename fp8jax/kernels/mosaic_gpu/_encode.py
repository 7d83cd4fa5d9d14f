"""Codes and scales of a block in registers: the arithmetic of the fused kernels."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.kernels._contract import ScaleKind, Tile

BLOCK = 128  # The longer side of every tile, and the sides of a CTA's block.

_IN_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))
_FP8_DTYPES = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2)))

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF_BITS = np.int32(0x7F800000)
_MANTISSA = np.int32((1 << 23) - 1)
# Exponent field of a power of two plus that of its reciprocal.
_RECIPROCAL = np.int32(254 << 23)
_SMALLEST_SCALE = np.float32(2.0**-126)


def check_arguments(
    name: str,
    inputs: Sequence[jax.Array],
    tiles: Mapping[str, Tile | None],
    allowed: tuple[Tile, ...],
    dtype: jax.typing.DTypeLike,
) -> None:
    """Refuses, on behalf of `name`, dtypes and tiles that no kernel here takes.

    Args:
        name: of the op.
        inputs: the arrays that are quantized, or what is, is computed from.
        tiles: by the name of the argument.
        allowed: tiles that the op takes.
        dtype: of the codes.

    Raises:
        NotImplementedError: With what came and what is allowed.
    """
    for argument, tile in tiles.items():
        if tile is not None and tuple(tile) not in allowed:
            raise NotImplementedError(
                f"mosaic_gpu {name} takes tiles of {allowed}, got {argument}={tile}."
            )
    dtypes = {x.dtype for x in inputs}
    if len(dtypes) > 1 or not dtypes <= set(_IN_DTYPES):
        raise NotImplementedError(
            f"mosaic_gpu {name} takes bfloat16, float16 or float32, one for all, got "
            f"{', '.join(str(x.dtype) for x in inputs)}."
        )
    if jnp.dtype(dtype) not in _FP8_DTYPES:
        raise NotImplementedError(
            f"mosaic_gpu {name} returns float8_e4m3fn or float8_e5m2, got "
            f"dtype={jnp.dtype(dtype)}."
        )


def amax_bits(values: jax.Array) -> jax.Array:
    """The bits of the largest magnitude in each row of `values`, float32 [rows, n].

    NaN > inf > finite: the maximum of bit patterns, because a float maximum may drop a
    NaN.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32) & _MAGNITUDE
    return jnp.max(bits, axis=1)


def scales(
    bits: jax.Array, kind: ScaleKind, eps: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Scales from the bits of amax, and for "pow2" their exact reciprocals."""
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    floored = jnp.maximum(amax, np.float32(eps)) if eps else amax
    inverse_max = np.float32(1.0 / float(jnp.finfo(dtype).max))
    scale = jnp.maximum(floored * inverse_max, _SMALLEST_SCALE)
    rounded = lax.bitcast_convert_type(scale, jnp.int32)
    if kind == "pow2":
        # Carries into the exponent unless it is a power of two.
        rounded = (rounded + _MANTISSA) & ~_MANTISSA
    rounded = jnp.where(bits == 0, np.float32(1).view(np.int32), rounded)
    inverse = _RECIPROCAL - rounded
    finite = bits < _INF_BITS
    nan = jnp.float32(jnp.nan)
    scale = jnp.where(finite, lax.bitcast_convert_type(rounded, jnp.float32), nan)
    inverse = jnp.where(finite, lax.bitcast_convert_type(inverse, jnp.float32), nan)
    return scale, inverse


def encode(
    values: jax.Array,
    scale: jax.Array,
    inverse: jax.Array,
    kind: ScaleKind,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Codes of float32 `values [rows, n]` for the rows' `scale` and its reciprocal.

    No clip: |x| <= amax, so x / s passes the largest code by at most an ulp of
    float32, which rounds back to it.
    """
    if kind == "pow2":
        scaled = values * lax.broadcast_in_dim(inverse, values.shape, (0,))
    else:
        scaled = values / lax.broadcast_in_dim(scale, values.shape, (0,))
    return scaled.astype(dtype)
