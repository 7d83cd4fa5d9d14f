"""Operations on codes that XLA may split over devices, by the names of dimensions."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fp8jax.ops._partition import (
    Factorization,
    Factors,
    named,
    split_over_devices,
)
from fp8jax.ops._partly_manual import Surroundings
from fp8jax.ops._spread import Spread, spread
from fp8jax.quant import QTensor


def over_devices(
    operation: Callable[..., Any],
    *operands: Any,
    names: tuple[Factors, ...],
    results: tuple[Factors, ...],
    summed: Factors = (),
    whole: Factors = (),
    multiples: Mapping[str, int] | None = None,
    **static: Any,
) -> Any:
    """`operation(*operands, **static)`, split over devices where arrays may be.

    Shards begin and end with tiles of the QTensors among the operands: there the
    numbers are those of one device, but for the order of sums over devices.

    Args:
        operation: a function at a module's top level. Where it sums over devices, its
            results are parts of the sum.
        operands: arrays and QTensors.
        names: of each operand's dimensions, letters and digits; of a QTensor's codes.
        results: of each result's dimensions.
        summed, whole: as in `Factorization`.
        multiples: likewise, of dimensions whose tiles are made in the operation.
        static: hashable.
    """
    if spread(*jax.tree.leaves(operands)) == Spread.ONE:
        return operation(*operands, **static)
    leaves, structure = jax.tree.flatten(operands)
    arrays, follows = [], []
    parts = dict(multiples or {})
    for i, (x, dimensions) in enumerate(zip(operands, names, strict=True)):
        arrays.append(dimensions)
        if isinstance(x, QTensor):
            scales = tuple(f"s{i}{name}" for name in dimensions)
            arrays.append(scales)
            sides = (*(1 for _ in dimensions[:-2]), *x.tile)
            follows += zip(scales, dimensions, sides, strict=True)
            for name, side in zip(dimensions[-2:], x.tile, strict=True):
                parts[name] = math.lcm(parts.get(name, 1), side)
    factors = Factorization(
        operands=tuple(arrays),
        results=results,
        summed=summed,
        whole=whole,
        multiples=tuple(parts.items()),
        follows=tuple(follows),
    )
    key = operation, structure, factors, tuple(static.items()), Surroundings.here()
    return _split(*key)(*leaves)


@functools.cache
def _split(
    operation: Callable[..., Any],
    structure: Any,
    factors: Factorization,
    static: tuple[tuple[str, Any], ...],
    here: Surroundings,
) -> Callable[..., Any]:
    def run(*leaves: jax.Array) -> Any:
        return operation(*jax.tree.unflatten(structure, leaves), **dict(static))

    name = named(operation.__qualname__, structure, factors, static, here)
    return split_over_devices(run, factors, name, here.mesh)
