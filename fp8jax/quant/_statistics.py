"""How well codes stand for an array, as sums that add up over arrays and devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import _dispatch, numerics
from fp8jax.quant._qtensor import QTensor

# What `moments` holds, in order. All but the last are sums.
MOMENTS = ("signal", "noise", "underflow", "saturated", "size", "amax")

# x / scale may exceed the largest code by rounding alone, where the scale is float32.
_ROUNDING = 1 + 2.0**-20


def moments(x: jax.Array, q: QTensor) -> jax.Array:
    """`MOMENTS` of an array and its codes, float32 `[6]`; see `statistics`.

    Args:
        x: any float dtype.
        q: codes and scales of the same shape.

    Raises:
        ValueError: If the shapes differ.
        TypeError: When differentiated.
    """
    if x.shape != q.shape:
        raise ValueError(f"moments takes equal shapes, got {x.shape} and {q.shape}.")
    x, q = _dispatch.undifferentiated("moments", (x, q))
    # The barrier keeps XLA from taking a cast to FP8 and back for the identity.
    q = lax.optimization_barrier(q)
    x = x.astype(jnp.float32)
    codes = jnp.abs(q.data.astype(jnp.float32))
    decoded = q.dequantize()
    is_largest = codes == jnp.float32(numerics.max_value(q.dtype))
    is_beyond = jnp.abs(x) > jnp.abs(decoded) * jnp.float32(_ROUNDING)
    parts = {
        "signal": jnp.sum(x * x),
        "noise": jnp.sum(jnp.square(x - decoded)),
        "underflow": jnp.sum((x != 0) & (codes == 0), dtype=jnp.float32),
        "saturated": jnp.sum(
            (is_largest & is_beyond) | jnp.isnan(decoded), dtype=jnp.float32
        ),
        "size": jnp.float32(x.size),
        "amax": jnp.squeeze(numerics.integer_amax(x, tuple(range(x.ndim)))),
    }
    return jnp.stack([parts[name] for name in MOMENTS])


def sum_moments(several: Sequence[jax.Array]) -> jax.Array:
    """Moments of several arrays together, `[..., 6]` each."""
    together = jnp.stack(several)
    return jnp.concatenate(
        [jnp.sum(together[..., :-1], 0), jnp.max(together[..., -1:], 0)], -1
    )


def statistics(moments: jax.Array) -> dict[str, jax.Array]:
    r"""What users read, of `[..., 6]` moments; each of shape `[...]`, float32.

    - `sqnr_db`: $10 \log_{10}(\sum x^2 / \sum (x - data \cdot scale)^2)$.
    - `underflow`: share of elements that are not zero and whose code is.
    - `saturated`: share of elements beyond the largest code, or in a tile that an
      infinity or a NaN has made NaN.
    - `amax`: largest magnitude.

    All but `amax` are NaN where nothing was counted.
    """
    parts = dict(zip(MOMENTS, jnp.moveaxis(moments, -1, 0), strict=True))
    return {
        "sqnr_db": 10 * jnp.log10(parts["signal"] / parts["noise"]),
        "underflow": parts["underflow"] / parts["size"],
        "saturated": parts["saturated"] / parts["size"],
        "amax": parts["amax"],
    }
