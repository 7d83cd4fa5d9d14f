"""E4M3's rounding in integer arithmetic, which XLA:CPU runs several values at a time.

Its own casts to and from float8 take two to three times as long there. On a GPU they
are instructions: use those.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DROPPED = np.int32(23 - 3)  # Bits of float32's mantissa that E4M3 has not.
_SIGN = np.int32(0x80)
_NAN = np.int32(0x7F)
_BIAS = np.int32((127 - 7) << 3)  # Between the two exponents, above E4M3's mantissa.
_SMALLEST_NORMAL = 2.0**-6
# Where float32's last place is E4M3's smallest subnormal, 2^-9.
_SUBNORMALS = 2.0**14


def encode_e4m3(x: jax.Array) -> jax.Array:
    """`x.astype(float8_e4m3fn)` of float32 x, at most 448 in magnitude or NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    normal = (_rounded(bits) >> _DROPPED & np.int32(0x7FF)) - _BIAS
    # The sum's last bits count the smallest subnormals; 8 of them are 2^-6's code, too.
    counted = lax.bitcast_convert_type(jnp.abs(x) + np.float32(_SUBNORMALS), jnp.int32)
    code = jnp.where(_is_subnormal(x), counted & np.int32(0xF), normal)
    code = jnp.where(jnp.isnan(x), _NAN, code) | (bits >> np.int32(24) & _SIGN)
    return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


def round_to_e4m3(x: jax.Array) -> jax.Array:
    """The value of `encode_e4m3(x)` as float32; zeros lose their sign."""
    bits = _rounded(lax.bitcast_convert_type(x, jnp.int32))
    kept = bits & np.int32(-1 << _DROPPED)
    normal = lax.bitcast_convert_type(kept, jnp.float32)
    shift = jnp.copysign(np.float32(_SUBNORMALS), x)
    value = jnp.where(_is_subnormal(x), (x + shift) - shift, normal)
    return jnp.where(jnp.isnan(x), x, value)


def _rounded(bits: jax.Array) -> jax.Array:
    """float32 bits such that cutting off what E4M3 drops rounds to nearest, even."""
    odd = bits >> _DROPPED & np.int32(1)
    return bits + np.int32((1 << (_DROPPED - 1)) - 1) + odd


def _is_subnormal(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < np.float32(_SMALLEST_NORMAL)
