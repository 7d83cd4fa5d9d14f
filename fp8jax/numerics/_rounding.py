"""Scales and codes: the arithmetic of fine-grained FP8 quantization.

Every function here is elementwise or a reduction over a tile, in float32. Scales, and
codes by power-of-two scales, have the same bits on every backend, jitted or not, but
that some take float32 subnormals for zero. By float32 scales a code may move by a step
where `x / scale` lies at a tie, because backends round division differently. Scales of
NumPy arrays are made in NumPy.

Convention: the scale multiplies, `x ~= data * scale`. No array holds a reciprocal.
"""

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.numerics._derivatives import no_derivative, refuse_derivatives
from fp8jax.numerics._formats import max_value

ScaleKind = Literal["pow2", "fp32"]
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

# Below it 1 / scale overflows float32 and the codes lose exactness.
SMALLEST_SCALE = 2.0**-126

_NO_AMAX_DERIVATIVE = (
    "integer_amax has no derivative: it reads bit patterns, whose derivative JAX takes "
    "for zero. Differentiate jnp.max(jnp.abs(x)), or take jax.lax.stop_gradient(x)."
)

_MANTISSA_BITS = np.int32(23)
_MANTISSA_MASK = np.int32((1 << _MANTISSA_BITS) - 1)


def integer_amax(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest magnitude along `axes` (kept), as float32, with NaN > inf > finite.

    The maximum is taken over the bit patterns of `|x|`, because a float maximum drops
    NaN on some backends (XLA:CPU). TypeError when differentiated: JAX's derivative of
    bit patterns is zero.
    """

    def amax(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
        largest = jnp.max(bits, axis=axes, keepdims=True)
        return lax.bitcast_convert_type(largest, jnp.float32)

    return refuse_derivatives(amax, _NO_AMAX_DERIVATIVE)(x)


def round_up_pow2(scale: AnyArray) -> AnyArray:
    """The smallest power of two that is at least `scale`, a positive normal float32.

    By bit arithmetic: `exp2(ceil(log2(s)))` is inexact on XLA:CPU, and a cast to
    `float8_e8m0fnu` rounds to nearest.
    """
    bits: Any = scale.view(np.int32)
    exponent = bits >> _MANTISSA_BITS
    exponent = exponent + ((bits & _MANTISSA_MASK) != 0).astype(np.int32)
    return (exponent << _MANTISSA_BITS).view(np.float32)


def scale_from_amax(
    amax: AnyArray,
    dtype: jax.typing.DTypeLike,
    kind: ScaleKind,
    eps: float = 0.0,
) -> AnyArray:
    r"""The float32 dequantization multiplier of tiles of largest magnitude `amax`.

    $$s = \max(\max(amax, eps) \cdot q_{max}^{-1}, 2^{-126})$$

    rounded up to a power of two for `kind="pow2"`; 1 where `amax` is zero; NaN where
    it is NaN or infinite, so that the whole tile dequantizes to NaN.

    Args:
        amax: float32, any shape, not negative.
        dtype: FP8 dtype of the codes.
        kind: `"pow2"` or `"fp32"`.
        eps: floor of `amax`, in units of `x`.
    """
    xp: Any = np if isinstance(amax, np.ndarray) else jnp
    # A product, because XLA turns `amax / 448` into one inside jit anyway.
    inverse_max = np.float32(1.0 / max_value(dtype))
    floored = xp.maximum(amax, np.float32(eps)) if eps else amax
    scale = xp.maximum(floored * inverse_max, np.float32(SMALLEST_SCALE))
    if kind == "pow2":
        scale = round_up_pow2(scale)
    scale = xp.where(amax == 0, np.float32(1), scale)
    return xp.where(xp.isfinite(amax), scale, np.float32(np.nan))


def encode(x: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    r"""$rne(clip(x / s, \pm q_{max}))$ as FP8 codes; a NaN stays one.

    Args:
        x: any float dtype; taken to float32.
        scale: float32, broadcast against `x`.
        dtype: FP8 dtype of the codes.

    Raises:
        TypeError: When differentiated.
    """
    limit = max_value(dtype)

    def run(x: jax.Array, scale: jax.Array) -> jax.Array:
        t = x.astype(jnp.float32) / scale
        # Casts differ by backend beyond the largest value, and a clip may drop NaN.
        return jnp.where(jnp.isnan(t), t, jnp.clip(t, -limit, limit)).astype(dtype)

    return refuse_derivatives(run, no_derivative("encode"))(x, scale)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """float32 `x` rounded to the nearest value of `dtype`, a float of 16 or 32 bits.

    Inside `jit` the cast alone would not do: XLA drops a cast down and up again as
    excess precision.
    """
    if dtype == jnp.bfloat16:
        info = jnp.finfo(dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)
    # reduce_precision flushes what float16 holds as subnormals.
    return lax.optimization_barrier(x.astype(dtype))


def decode_tiles(data: jax.Array, scale: jax.Array) -> jax.Array:
    """`data * scale` in float32, for tiles `[mt, tm, kt, tk]` and scales `[mt, kt]`.

    The scale may be differentiated; TypeError if the codes are.
    """
    wide = refuse_derivatives(_as_float32, no_derivative("decode_tiles"))(data)
    return wide * scale[:, None, :, None]


def _as_float32(data: jax.Array) -> jax.Array:
    return data.astype(jnp.float32)
