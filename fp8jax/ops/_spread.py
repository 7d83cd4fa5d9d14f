"""Whether arrays are spread over several devices, as far as a trace can tell."""

import dataclasses
import enum
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding

from fp8jax.matmul import has_gpu_kernels


class Spread(enum.IntEnum):
    """Over how many devices XLA splits an array; the larger one wins."""

    ONE = 0
    UNKNOWN = 1  # Under a trace, types do not tell.
    MANY = 2


def spread(*arrays: Any) -> Spread:
    """Over how many devices XLA may split a computation with these arrays.

    Inside of a `shard_map` over the whole mesh that is one: each device has its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_types and set(mesh.axis_types) == {AxisType.Manual}:
        return Spread.ONE
    if mesh.axis_types and set(mesh.axis_types) == {AxisType.Explicit}:
        # Types tell: an array without a mesh is whole on each device.
        return max(map(_of_type, arrays), default=Spread.ONE)
    found = spread_of_mesh(mesh)
    for x in arrays:  # Asked for each leaf of each call.
        if not isinstance(x, Tracer):
            sharding = getattr(x, "sharding", None)
            if type(sharding) is not SingleDeviceSharding:
                found = max(found, spread_of_sharding(sharding))
        elif found == Spread.ONE and not _is_only_device():
            found = Spread.UNKNOWN
    return found


@dataclasses.dataclass(frozen=True)
class Placement:
    """What arrays tell of the mesh that they are split over. Hashable.

    Attributes:
        axes: names and sizes of the mesh's axes.
        split: for each array, the axes that split each of its dimensions, but for the
            last ones that none splits.
    """

    axes: tuple[tuple[str, int], ...] = ()
    split: tuple[tuple[tuple[str, ...], ...], ...] = ()


def placement(arrays: Sequence[Any]) -> Placement:
    """What the shardings of arrays tell; tracers have none to tell."""
    known = (None if isinstance(x, Tracer) else x for x in arrays)
    return placement_of([getattr(x, "sharding", None) for x in known])


def placement_of(shardings: Sequence[Any]) -> Placement:
    """What these tell, one for each array: shardings, specs or None."""
    axes = {axis for x in shardings for axis in axes_of_sharding(x)}
    return Placement(tuple(sorted(axes)), tuple(map(_split_by, shardings)))


@functools.lru_cache(maxsize=4096)
def axes_of_sharding(sharding: Any) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the axes of a sharding's mesh that has several devices."""
    mesh = getattr(sharding, "mesh", None)
    return () if mesh is None else axes_of_mesh(mesh)


def axes_of_mesh(mesh: Any) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the axes along which a mesh has several devices."""
    return tuple((name, size) for name, size in mesh.shape.items() if size > 1)


@functools.lru_cache(maxsize=4096)
def _split_by(sharding: Any) -> tuple[tuple[str, ...], ...]:
    spec = getattr(sharding, "spec", None) or ()
    spec = sharding if isinstance(sharding, PartitionSpec) else spec
    dims = [tuple(jax.tree.leaves(names)) for names in tuple(spec)]
    while dims and not dims[-1]:
        dims.pop()
    return tuple(dims)


def without_split(name: str, implementation: str | None, *arrays: Any) -> str | None:
    """The implementation of an op that XLA has no rule to split by.

    XLA would gather the operands of a GPU's kernel; its own kernels it splits.

    Args:
        name: of the op, for the warning where that is slow.
        implementation: what the user asked for, which stays.
        arrays: pytrees of its operands.
    """
    if implementation is not None or spread(*jax.tree.leaves(arrays)) == Spread.ONE:
        return implementation
    if has_gpu_kernels():
        warnings.warn(
            f"{name} runs in XLA's emulation of FP8, many times slower than the GPU "
            "kernels: its arrays may be sharded, and XLA has no rule to split it by. "
            "Call it in a jax.shard_map, or, where all arrays lie on one device, pass "
            'implementation="mosaic_gpu".',
            stacklevel=3,
        )
    return "xla"


def _of_type(x: Any) -> Spread:
    return spread_of_mesh(jax.typeof(x).sharding.mesh)


def spread_of_mesh(mesh: Any) -> Spread:
    """What a computation on this mesh, or none, is."""
    return Spread.MANY if mesh is not None and mesh.size > 1 else Spread.ONE


def spread_of_sharding(sharding: Any) -> Spread:
    """What an array of this sharding is."""
    if sharding is None:
        return Spread.ONE
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None:
        return spread_of_mesh(mesh)
    return Spread.MANY if getattr(sharding, "num_devices", 1) > 1 else Spread.ONE


@functools.cache
def _is_only_device() -> bool:
    return jax.device_count() == 1
