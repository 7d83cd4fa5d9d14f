"""What the tests of several kernels check by: oracles, counted bounds, poison."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.testing import gemm_float64

_F32_STEP = 2.0**-24


def on_cpu(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)` compiled for the CPU, as NumPy arrays: an oracle of few operations.

    XLA:GPU takes longer to compile one than Mosaic takes for the kernel.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.jit(run)(*jax.tree.map(np.asarray, args))
        return jax.tree.map(np.asarray, out)


def small_codes(rng, shape, dtype=jnp.float8_e4m3fn) -> jax.Array:
    """Integers whose sums are exact in the tensor core.

    |l r| <= 16 and 128 of them make at most 2^11: it keeps 13 bits or more below the
    largest addend.
    """
    # Cast by NumPy: JAX would compile a cast for every shape.
    return jnp.asarray(rng.integers(-4, 5, shape).astype(np.float32).astype(dtype))


def assert_promoted_sum(
    out: Any,
    lhs: Any,
    lhs_scale: Any,
    rhs: Any,
    rhs_scale: Any,
    *,
    lhs_tile: tuple[int, int],
    rhs_tile: tuple[int, int],
) -> None:
    """`out` is the product of `small_codes` in float64, up to what promotion rounds.

    Each chunk rounds twice in float32, the product of its scales and the fused sum,
    which lies below the sum of magnitudes; the output's own rounding comes last.
    """
    total, magnitude = np.zeros(out.shape), np.zeros(out.shape)
    chunks = lhs_scale.shape[1]
    for c in range(chunks):
        k, chunk = slice(128 * c, 128 * (c + 1)), slice(c, c + 1)
        term = gemm_float64(
            np.asarray(lhs[:, k]),
            np.asarray(lhs_scale[:, chunk]),
            np.asarray(rhs[:, k]),
            np.asarray(rhs_scale[:, chunk]),
            lhs_tile=lhs_tile,
            rhs_tile=rhs_tile,
        )
        assert term.shape == out.shape
        total += term
        magnitude += np.abs(term)
    bound = 2 * chunks * _F32_STEP * magnitude
    bound += float(jnp.finfo(out.dtype).eps) / 2 * (np.abs(total) + bound)
    error = np.abs(np.asarray(out, np.float64) - total)
    assert (error <= bound).all(), (error - bound).max()


@jax.jit
def _same_bits(left: Any, right: Any) -> jax.Array:
    def same(a: jax.Array, b: jax.Array) -> jax.Array:
        bits = f"uint{8 * a.dtype.itemsize}"
        return (
            lax.bitcast_convert_type(a, bits) == lax.bitcast_convert_type(b, bits)
        ).all()

    return jnp.stack(jax.tree.leaves(jax.tree.map(same, left, right))).all()


def assert_repeats(run: Callable[..., Any], *args: Any) -> Any:
    """Twenty more runs have the first one's bits, compared where they are."""
    first = run(*args)
    assert all(bool(_same_bits(run(*args), first)) for _ in range(20))
    return first


def run_on_poisoned_output(
    run: Callable[..., jax.Array], args: tuple, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, bool]:
    """`run(*args)` written to a donated buffer of NaN, and whether it was that one."""
    poison = jax.block_until_ready(jnp.full(shape, jnp.nan, dtype))
    where = poison.unsafe_buffer_pointer()
    donating = jax.jit(
        lambda poison, *args: run(*args), donate_argnums=0, keep_unused=True
    )
    out = donating(poison, *args)
    return out, out.unsafe_buffer_pointer() == where
