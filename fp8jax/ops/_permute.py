"""Rows of tokens to their experts and back, by gathers in both directions of autodiff.

The derivative of a gather is a scatter that adds, whose order, and so whose sum, a GPU
does not fix. Each slot of a token goes to one row and back, so the derivatives here are
gathers too: the same bits run after run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dispatch(NamedTuple):
    """Slots sorted by their experts; slot `t * top_k + j` is the j-th of token t.

    Attributes:
        slots: int32 `[rows]`, the slot of each row; `rows = tokens * top_k`.
        rows: int32 `[tokens, top_k]`, the row of each slot.
        group_sizes: int32 `[experts]`, rows of each expert; they add up to all.
    """

    slots: jax.Array
    rows: jax.Array
    group_sizes: jax.Array


def dispatch(experts: jax.Array, num_experts: int) -> Dispatch:
    """Sorts tokens by expert, each expert's in their order: none is dropped.

    Args:
        experts: int32 `[tokens, top_k]`, each below `num_experts`.
        num_experts: how many there are.
    """
    flat = experts.reshape(-1)
    slots = jnp.argsort(flat, stable=True).astype(jnp.int32)
    numbers = jnp.arange(flat.size, dtype=jnp.int32)
    rows = jnp.zeros_like(numbers).at[slots].set(numbers, unique_indices=True)
    sizes = (flat[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    return Dispatch(slots, rows.reshape(experts.shape), sizes)


@jax.custom_vjp
def permute(x: jax.Array, to: Dispatch) -> jax.Array:
    """The token of each row: x `[tokens, k]` to `[rows, k]`.

    The gradient of a token is the sum of its rows', in float32.
    """
    return x[to.slots // to.rows.shape[1]]


@jax.custom_vjp
def unpermute(y: jax.Array, weights: jax.Array, to: Dispatch) -> jax.Array:
    """Each token's weighted sum of its rows, in float32, rounded to y's dtype.

    Args:
        y: `[rows, n]`.
        weights: float32 `[tokens, top_k]`.
        to: as `permute` was given it.

    Returns:
        `[tokens, n]` in the dtype of y.
    """
    slots = y[to.rows].astype(jnp.float32)  # [tokens, top_k, n]
    return (slots * weights[:, :, None]).sum(axis=1).astype(y.dtype)


def _permute_gradient(to: Dispatch, dout: jax.Array) -> tuple[jax.Array, None]:
    ones = jnp.ones(to.rows.shape, jnp.float32)
    return unpermute(dout, ones, to), None


def _unpermute_gradient(
    kept: tuple[jax.Array, jax.Array, Dispatch], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y, weights, to = kept
    of_rows = permute(dout, to).astype(jnp.float32)  # [rows, n]
    dy = of_rows * weights.reshape(-1)[to.slots][:, None]
    products = (of_rows * y.astype(jnp.float32)).sum(axis=1)
    return dy.astype(y.dtype), products[to.rows], None


permute.defvjp(lambda x, to: (permute(x, to), to), _permute_gradient)
unpermute.defvjp(
    lambda y, weights, to: (unpermute(y, weights, to), (y, weights, to)),
    _unpermute_gradient,
)
