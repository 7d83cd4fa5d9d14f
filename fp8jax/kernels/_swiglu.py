"""The arithmetic of SwiGLU and its gradient, elementwise in float32.

One spelling for every lowering: which product is rounded first is part of what the
numbers mean.
"""

import jax
import jax.numpy as jnp
from jax import lax


def swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    r"""$h = (g \, \sigma(g)) \, u$, with $\sigma(g) = 1 / (1 + e^{-g})$."""
    return (gate * sigmoid(gate) * up,)


def swiglu_gradient(
    gate: jax.Array, up: jax.Array, dh: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""$dg = dh \, u \, \sigma (1 + g (1 - \sigma))$ and $du = dh \, g \, \sigma$."""
    one = jnp.float32(1)
    s = sigmoid(gate)
    dgate = dh * up * (s * (one + gate * (one - s)))
    return dgate, dh * (gate * s)


def sigmoid(x: jax.Array) -> jax.Array:
    r"""$\sigma(x) = 1 / (1 + e^{-x})$ of float32 x."""
    # The square of an inverse root: one instruction, within some ulps, where a division
    # takes ten and a branch.
    root = lax.rsqrt(jnp.float32(1) + jnp.exp(-x))
    return root * root
