"""How far a quantized array is from what it stands for."""

import jax
import jax.numpy as jnp


def _pair(actual: jax.Array, expected: jax.Array, name: str):
    if actual.shape != expected.shape:
        raise ValueError(
            f"{name} compares arrays of one shape, got {actual.shape} and "
            f"{expected.shape}."
        )
    return actual.astype(jnp.float32), expected.astype(jnp.float32)


def relative_error(actual: jax.Array, expected: jax.Array) -> jax.Array:
    r"""$\lVert a - e \rVert / \lVert e \rVert$ (Frobenius), a float32 scalar."""
    a, e = _pair(actual, expected, "relative_error")
    return jnp.linalg.norm((a - e).ravel()) / jnp.linalg.norm(e.ravel())


def sqnr_db(actual: jax.Array, expected: jax.Array) -> jax.Array:
    r"""Signal to quantization noise ratio in dB: $-20 \log_{10}$ of the relative error.

    E4M3 with one scale a tile keeps roughly 31 dB of normally distributed data.
    """
    return -20.0 * jnp.log10(relative_error(actual, expected))


def cosine_similarity(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Cosine of the angle between two arrays taken as vectors, a float32 scalar."""
    a, e = _pair(actual, expected, "cosine_similarity")
    a, e = a.ravel(), e.ravel()
    return jnp.dot(a, e) / (jnp.linalg.norm(a) * jnp.linalg.norm(e))
