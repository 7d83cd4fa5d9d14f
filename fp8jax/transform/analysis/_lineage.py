"""Of which arguments a value is a version: the same array, changed but no other one.

A parameter that the step scales, masks, stacks or updates before it multiplies by it
is a parameter still, and an activation that parameters went into is none. What tells
them apart is what went in at full size: a mask of a weight's own shape, a gain that is
broadcast over its columns and a gradient subtracted from it leave the weight a version
of the argument; a matrix product, a sum over rows or a lookup by tokens makes something
else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fp8jax.transform.analysis._values import Value, joined, union
from fp8jax.transform.ir import primitive_of

# Results hold their operands' elements side by side.
_ASSEMBLING = ("concatenate", "dynamic_update_slice", "pad", "scatter", "stack")


def changed(eqn: Any, operands: Sequence[Value], value: Value) -> Value:
    """The value of an equation that is no product, and what it is a version of."""
    if primitive_of(eqn) in _ASSEMBLING:
        return alternative(value, operands, parts=True)
    full = _of_full_size(eqn, operands)
    if not full or sum(x.is_spread for x in full) > 1:
        return value  # A sum, say, or as an outer product of vectors.
    return alternative(value, full, parts=any(x.parts for x in full))


def updated(eqn: Any, operands: Sequence[Value]) -> int:
    """Leaves that an equation puts something into that gradients went into."""
    full = _of_full_size(eqn, operands)
    if not any(x.cotangent for x in full):
        return 0
    return union(x.versions for x in full if not x.cotangent)


def _of_full_size(eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """Operands with as many elements as the one result."""
    if len(eqn.outvars) != 1:
        return []
    out = getattr(eqn.outvars[0].aval, "size", 0)
    return [
        x
        for x, v in zip(operands, eqn.invars, strict=True)
        if out and getattr(v.aval, "size", 0) == out
    ]


def alternative(value: Value, versions: Sequence[Value], parts: bool = False) -> Value:
    """The value as what each of these is: one of them, or all, element by element."""
    return dataclasses.replace(
        value,
        versions=union(x.versions for x in versions),
        others=union(x.others for x in versions),
        parts=parts,
    )


def spread(value: Value) -> Value:
    """The value, repeated over more elements: it scales what it meets, or shifts it."""
    return dataclasses.replace(value, versions=0, others=0, parts=False)


def picked(value: Value, x: Value, indices: Sequence[Value]) -> Value:
    """A slice of `x`, or rows of it; those that data pick are something else."""
    if any(i.leaves for i in indices):
        return value
    return alternative(value, [x], parts=x.parts)


def outside(value: Value) -> Value:
    """A result of an equation that is in no pass."""
    return dataclasses.replace(value, ended=True) if value.cotangent else value


def begun(value: Value) -> Value:
    """What a forward pass begins with: no cotangent, whatever was trained before."""
    if value.versions:
        value = dataclasses.replace(
            value, leaves=value.versions | value.others, product=bool(value.others)
        )
    else:
        value = dataclasses.replace(value, others=value.leaves)
    return dataclasses.replace(value, cotangent=False, ended=False, residual=True)


def in_all_iterations(first: Value, last: Value) -> Value:
    """What a loop's carry is in all iterations."""
    both = (first, last)
    value = alternative(joined(both), both, parts=any(x.parts for x in both))
    return dataclasses.replace(value, number=first.number, root=first.root)
