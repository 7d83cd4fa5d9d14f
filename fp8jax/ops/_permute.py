"""Rows of tokens to their experts and back, by gathers in both directions of autodiff.

The derivative of a gather is a scatter that adds, whose order, and so whose sum, a GPU
does not fix. Each slot of a token goes to one row and back, so the derivatives here are
gathers too: the same bits run after run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax import numerics


class Dispatch(NamedTuple):
    """Slots sorted by their experts; slot `t * top_k + j` is the j-th of token t.

    Attributes:
        slots: int32 `[rows]`, the slot of each row; `tokens * top_k` in a row of none.
        rows: int32 `[tokens, top_k]`, the row of each slot.
        group_sizes: int32 `[experts]`, rows of each expert, those of no slot with it.
        load: int32 `[experts]`, slots of each expert; they add up to all.
    """

    slots: jax.Array
    rows: jax.Array
    group_sizes: jax.Array
    load: jax.Array


def dispatch(experts: jax.Array, num_experts: int, *, align: int = 1) -> Dispatch:
    """Sorts tokens by expert, each expert's in their order: none is dropped.

    Args:
        experts: int32 `[tokens, top_k]`, each below `num_experts`.
        num_experts: how many there are.
        align: what every expert's number of rows is rounded up to a multiple of, so
            that its first one is a multiple, too. `align * numerics.count_group_blocks(
            tokens * top_k, num_experts, align)` rows hold all, whatever the routing.

    Raises:
        ValueError: If `align` is below 1.
    """
    if align < 1:
        raise ValueError(f"dispatch takes an align of at least 1, got {align}.")
    flat = experts.reshape(-1)
    count = flat.size
    by_expert = jnp.argsort(flat, stable=True).astype(jnp.int32)
    load = (flat[:, None] == jnp.arange(num_experts)[None]).sum(axis=0, dtype=jnp.int32)
    added = -load % align  # [experts] rows of no slot
    # Those of the experts before push an expert's rows back.
    pushed = jnp.cumsum(added, dtype=jnp.int32) - added
    places = jnp.arange(count, dtype=jnp.int32) + pushed[flat[by_expert]]
    how: Any = {"unique_indices": True, "mode": "promise_in_bounds"}
    rows = jnp.zeros(count, jnp.int32).at[by_expert].set(places, **how)
    total = align * numerics.count_group_blocks(count, num_experts, align)
    slots = jnp.full(total, count, jnp.int32).at[places].set(by_expert, **how)
    return Dispatch(slots, rows.reshape(experts.shape), load + added, load)


@jax.custom_vjp
def permute(x: jax.Array, to: Dispatch) -> jax.Array:
    """The token of each row: x `[tokens, k]` to `[rows, k]`, zero in rows of no slot.

    The gradient of a token is the sum of its rows', in float32.
    """
    return _or_zero(x, to.slots // to.rows.shape[1])


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
    slots = _rows_of(y, to.rows).astype(jnp.float32)  # [tokens, top_k, n]
    return (slots * weights[:, :, None]).sum(axis=1).astype(y.dtype)


def _permute_gradient(to: Dispatch, dout: jax.Array) -> tuple[jax.Array, None]:
    ones = jnp.ones(to.rows.shape, jnp.float32)
    return unpermute(dout, ones, to), None


def _unpermute_gradient(
    kept: tuple[jax.Array, jax.Array, Dispatch], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y, weights, to = kept
    of_rows = permute(dout, to).astype(jnp.float32)  # [rows, n]
    dy = of_rows * _or_zero(weights.reshape(-1), to.slots)[:, None]
    products = (of_rows * y.astype(jnp.float32)).sum(axis=1)
    return dy.astype(y.dtype), _rows_of(products, to.rows), None


def _or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]`, zero where that is past x's end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` of rows that exist: nothing is asked about their numbers."""
    return x.at[index].get(mode="promise_in_bounds")


permute.defvjp(lambda x, to: (permute(x, to), to), _permute_gradient)
unpermute.defvjp(
    lambda y, weights, to: (unpermute(y, weights, to), (y, weights, to)),
    _unpermute_gradient,
)
