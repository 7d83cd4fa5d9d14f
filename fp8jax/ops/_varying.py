"""Operands of one operation, in a `shard_map` that checks what varies over devices."""

from typing import TypeVar

import jax

from fp8jax import _compat

_Trees = TypeVar("_Trees")


def vary_alike(trees: _Trees) -> _Trees:
    """`trees` of arrays, each varying along every mesh axis that one of them varies on.

    Outside of any rule for derivatives: JAX's transpose of the cast is the sum over
    devices that the gradient of a value shared by them takes. Without a `shard_map`, or
    in one with `check_vma=False`, they are as they came.
    """
    axes = _compat.union_of_varying_axes(*jax.tree.leaves(trees))
    return jax.tree.map(lambda x: _compat.varying_over(x, axes), trees)
