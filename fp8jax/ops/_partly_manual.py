"""Which device is which for the partitioner within a `shard_map` over some mesh axes.

There XLA partitions over the other axes alone: it numbers the devices of a group anew,
in the order that the sharding of the operation's result happens to have, and describes
shardings by those numbers. Sums over devices name axes of the whole mesh, though. What
tells which number is which device is an operand of known sharding: a compass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from fp8jax import _compat
from fp8jax.matmul import has_gpu_kernels


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the tracing of an operation for the partitioner depends on, beside arrays.

    Attributes:
        mesh: of a `shard_map` over some of its axes, if traced within one.
        has_kernels: whether the GPU kernels run here.
    """

    mesh: AbstractMesh | None = None
    has_kernels: bool = False

    @classmethod
    def here(cls) -> "Surroundings":
        mesh = jax.sharding.get_abstract_mesh()
        return cls(mesh if mesh.manual_axes else None, has_gpu_kernels())


def free_axes(around: AbstractMesh) -> tuple[str, ...]:
    """The axes that the partitioner has to itself."""
    return tuple(a for a in around.axis_names if a not in around.manual_axes)


def free_mesh(around: AbstractMesh) -> AbstractMesh:
    """The mesh of the free axes."""
    axes = free_axes(around)
    return AbstractMesh(tuple(around.shape[a] for a in axes), axes)


def compass(around: AbstractMesh) -> jax.Array:
    """An array with a dimension for each free axis, split by it."""
    axes = free_axes(around)
    array = jnp.zeros([around.shape[a] for a in axes], jnp.int8)
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))


def partitioned_mesh(around: AbstractMesh, sharding: Any) -> AbstractMesh | None:
    """The mesh of the free axes in the order by which the partitioner numbers devices.

    Args:
        around: the whole mesh.
        sharding: the compass', as the partitioner gives it.

    Returns:
        None if the sharding does not tell.
    """
    axes = free_axes(around)
    sizes = [around.shape[a] for a in axes]
    numbers = _compat.numbers_of(sharding, len(axes))
    if numbers is None or list(numbers.shape) != sizes:
        return None
    steps = {
        axis: int(numbers.take(1, dimension).flat[0] - numbers.flat[0])
        if numbers.shape[dimension] > 1
        else 0
        for dimension, axis in enumerate(axes)
    }
    order = sorted(axes, key=lambda axis: -steps[axis])
    mesh = AbstractMesh(tuple(around.shape[a] for a in order), tuple(order))
    expected = np.arange(mesh.size).reshape(mesh.axis_sizes)
    expected = expected.transpose([order.index(a) for a in axes])
    return mesh if np.array_equal(expected, numbers) else None
