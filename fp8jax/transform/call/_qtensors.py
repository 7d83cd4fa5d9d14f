"""QTensors among the arguments: the arrays that a function sees instead of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fp8jax.ops import marked
from fp8jax.quant import QTensor


@dataclasses.dataclass(frozen=True)
class Dequantize:
    """A marked call that makes an array of codes and scales."""

    tile: tuple[int, int]
    dtype: np.dtype

    def __call__(self, data: jax.Array, scale: jax.Array) -> jax.Array:
        def run(data: jax.Array, scale: jax.Array) -> jax.Array:
            return QTensor(data, scale, self.tile).dequantize(self.dtype)

        return marked("dequantize", run)(data, scale)


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def has_qtensors(tree: Any) -> bool:
    """Whether a pytree holds a QTensor."""
    return any(map(_is_qtensor, jax.tree.leaves(tree, is_leaf=_is_qtensor)))


def as_arrays(
    tree: Any, dtype: jax.typing.DTypeLike
) -> tuple[Any, list[Dequantize], Callable[[Any], Any]]:
    """A tree with arrays of `dtype` for its QTensors.

    Returns:
        The tree; the calls that made its arrays, in their order; and a function that
        puts QTensors back where those very arrays are in another tree: what a function
        returns as it came stays what it was.
    """
    calls: list[Dequantize] = []
    came: dict[int, tuple[jax.Array, QTensor]] = {}

    def array(x: Any) -> Any:
        if not _is_qtensor(x):
            return x
        x.check("fp8_transform")
        calls.append(Dequantize(x.tile, np.dtype(dtype)))
        made = calls[-1](x.data, x.scale)
        came[id(made)] = made, x  # Kept, so that the number stays its own.
        return made

    def put_back(x: Any) -> Any:
        return came[id(x)][1] if id(x) in came else x

    arrays = jax.tree.map(array, tree, is_leaf=_is_qtensor)
    return arrays, calls, lambda outputs: jax.tree.map(put_back, outputs)
