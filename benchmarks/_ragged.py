"""BF16 products of rows in groups: XLA's, and the Hopper kernels that JAX comes with.

`jax.lax.ragged_dot` is what a user has. XLA multiplies every row by every group's
matrix there, most of it masked, so Pallas' own kernels are the baseline that counts.
They are examples in JAX's source: JAX neither dispatches to them nor differentiates
them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_WGRAD = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


class Blocks(NamedTuple):
    """A block shape of Pallas' kernels: rows, columns, contraction; slots it fills."""

    m: int
    n: int
    k: int
    steps: int


# The accumulator of a block lies in the registers of one warpgroup, and its slots in
# shared memory: there is little to choose from. The first is what JAX's own tests take.
BLOCKS = (Blocks(128, 128, 64, 4), Blocks(64, 256, 64, 4), Blocks(128, 128, 64, 6))
_DEFAULT = BLOCKS[0]


def xla_rows(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x [m, k]` by `w [g, k, n]`: `lax.ragged_dot`."""
    return lax.ragged_dot(x, w, sizes)


def xla_columns(x: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x [t, m]` transposed by `dout [t, n]`, float32 `[g, m, n]`."""
    return lax.ragged_dot_general(
        x, dout, sizes, _WGRAD, preferred_element_type=jnp.float32
    )


def pallas_rows(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    blocks: Blocks = _DEFAULT,
    transposed: bool = False,
) -> jax.Array:
    """`x [m, k]` by `w [g, k, n]`, or `[g, n, k]` if `transposed`, in x's dtype.

    Rows of no group are not written.

    Raises:
        ImportError: Where JAX comes without it.
        NotImplementedError: For sides that these blocks do not divide.
    """
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    n = w.shape[1 if transposed else 2]
    _check_divides(blocks, n=n, k=x.shape[1])
    return ragged_dot_mgpu.ragged_dot(
        x,
        w,
        group_sizes=sizes,
        block_m=blocks.m,
        block_n=blocks.n,
        block_k=blocks.k,
        max_concurrent_steps=blocks.steps,
        grid_block_n=math.gcd(8, n // blocks.n),
        transpose_rhs=transposed,
    )


def pallas_columns(
    x: jax.Array, dout: jax.Array, sizes: jax.Array, *, blocks: Blocks = _DEFAULT
) -> jax.Array:
    """`x [t, m]` transposed by `dout [t, n]`, `[g, m, n]` in x's dtype.

    Raises:
        ImportError, NotImplementedError: As `pallas_rows` does.
    """
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    m, n = x.shape[1], dout.shape[1]
    _check_divides(blocks, m=m, n=n)
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
        x,
        dout,
        group_sizes=sizes,
        block_m=blocks.m,
        block_n=blocks.n,
        block_k=blocks.k,
        max_concurrent_steps=blocks.steps,
        grid_block_n=math.gcd(8, n // blocks.n),
    )


@jax.custom_vjp
def pallas_ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`lax.ragged_dot` of rows that are all in groups, and its gradients, by Pallas."""
    return pallas_rows(x, w, sizes)


def _forward(
    x: jax.Array, w: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return pallas_rows(x, w, sizes), (x, w, sizes)


def _backward(
    kept: tuple[jax.Array, ...], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    return (
        pallas_rows(dout, w, sizes, transposed=True),
        pallas_columns(x, dout, sizes),
        None,
    )


pallas_ragged_dot.defvjp(_forward, _backward)


def _check_divides(blocks: Blocks, **sides: int) -> None:
    for name, side in sides.items():
        block = getattr(blocks, name)
        if side % block:
            raise NotImplementedError(
                f"Pallas' kernels take {name} in whole blocks of {block}, got {side}."
            )
