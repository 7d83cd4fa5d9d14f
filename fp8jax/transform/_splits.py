"""What a trace knows of the mesh: from arguments, from the jit and from the program."""

from collections.abc import Sequence
from typing import Any

import jax

from fp8jax import _compat, ops
from fp8jax.transform.analysis import axes_of_program
from fp8jax.transform.ir import AnyJaxpr, Atom, aval_of
from fp8jax.transform.plan import Splits


def splits_of(
    placement: ops.Placement, told: Sequence[Any], jaxpr: AnyJaxpr, weights: int
) -> Splits:
    """Sizes of the mesh's axes, and which ones split batches.

    Args:
        placement: of the arguments' arrays.
        told: shardings that the jit names.
        jaxpr: the program.
        weights: `Value.leaves` of the parameters.
    """
    axes = {**axes_of_program(jaxpr), **dict(placement.axes)}
    for sharding in told:
        axes.update(ops.axes_of_sharding(sharding))
    # Hidden by a jit around this one, say: then any count of the devices is an axis.
    axes = axes or {"": jax.device_count()}
    inner = _compat.open_jaxpr(jaxpr)
    returned = {_type_of(x) for x in inner.outvars}
    arguments = zip(inner.invars, placement.split, strict=False)
    batches = [
        dims
        for i, (v, dims) in enumerate(arguments)
        # What a step makes anew, parameters and moments, has axes of its own.
        if not weights >> i & 1 and _type_of(v) not in returned
    ]
    first = {name for dims in batches for names in dims[:1] for name in names}
    later = {name for dims in batches for names in dims[1:] for name in names}
    return Splits(axes, frozenset(first | later), frozenset(first - later))


def _type_of(x: Atom) -> tuple[Any, ...]:
    return aval_of(x).shape, aval_of(x).dtype


def told_placement(in_shardings: Any, args: Sequence[Any]) -> ops.Placement:
    """What a jit's `in_shardings` tell of positional arguments, arrays in pytrees."""
    if not isinstance(in_shardings, tuple):
        in_shardings = (in_shardings,) * len(args)
    told = []

    def of_all(sharding: Any, arrays: Any) -> None:
        sharding = getattr(sharding, "sharding", sharding)  # A layout has one.
        told.extend([sharding] * len(jax.tree.leaves(arrays)))

    try:
        for prefix, arrays in zip(in_shardings, args, strict=False):
            jax.tree.map(of_all, prefix, arrays, is_leaf=lambda x: x is None)
    except ValueError:  # Prefixes of other kinds, as NNX has them, tell nothing here.
        return ops.Placement()
    return ops.placement_of(told)
