"""Sides of arrays: numbers, or symbolic dimensions under `jax.export`."""

from typing import Any

from jax import export


def is_symbolic(*arrays: Any) -> bool:
    """Whether an array (or a type) has a side that is not a number."""
    return any(export.is_symbolic_dim(side) for x in arrays for side in x.shape)


def may_be_one(side: int) -> bool:
    """Whether an array has one row, as far as is known."""
    return export.is_symbolic_dim(side) or side == 1


def at_most(side: int, limit: int) -> int:
    """`min(side, limit)`, or `limit` where the side is symbolic."""
    return limit if export.is_symbolic_dim(side) else min(side, limit)
