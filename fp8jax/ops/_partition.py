"""How a product in FP8 is split over devices: as the plain product, then locally.

XLA's partitioner knows what to do with a `dot_general`, but not with the quantization
and the loop over chunks that stand in for one: it would gather operands. So the whole
of it is one operation that tells the partitioner what a `dot_general` of the operands
would: which dimensions may be split, which one is summed over. Operands are moved, if
at all, before they are quantized. Each device quantizes and multiplies what it has, in
the kernels of one device. Where the contraction is split, each device's part is rounded
to the result's dtype and added as the plain product's is, so that XLA joins sums and
scatters them as it does there. Tiles begin anew at each shard's edge: shards of a
multiple of 128 have the tiles of the whole array.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from fp8jax import _compat
from fp8jax.ops._lowered_once import lowered_once
from fp8jax.ops._partly_manual import compass, free_axes, free_mesh, partitioned_mesh

Factors = tuple[str, ...]  # One name for each dimension of an array.
Product = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The dimensions of a `dot_general` by name: equal names, equal dimensions.

    Attributes:
        lhs, rhs, out: names of each array's dimensions.
        summed: names of those contracted.
    """

    lhs: Factors
    rhs: Factors
    out: Factors
    summed: Factors

    def mapped(self, is_mapped: Sequence[bool]) -> "Factorization":
        """Of the product mapped over a new first dimension of some of the operands."""
        name = f"v{sum(factor[0] == 'v' for factor in self.out)}"
        lhs, rhs = (
            (name, *names) if mapped else names
            for names, mapped in zip((self.lhs, self.rhs), is_mapped, strict=True)
        )
        return Factorization(lhs, rhs, (name, *self.out), self.summed)

    @classmethod
    def of(cls, lhs_rank: int, rhs_rank: int, numbers: Any) -> "Factorization":
        (l_sum, r_sum), (l_batch, r_batch) = numbers
        lhs = [f"m{i}" for i in range(lhs_rank)]
        rhs = [f"n{i}" for i in range(rhs_rank)]
        for name, l_dims, r_dims in (("k", l_sum, r_sum), ("b", l_batch, r_batch)):
            for i, (left, right) in enumerate(zip(l_dims, r_dims, strict=True)):
                lhs[left] = rhs[right] = f"{name}{i}"
        batch = tuple(lhs[d] for d in l_batch)
        summed = tuple(lhs[d] for d in l_sum)
        free = [name for name in (*lhs, *rhs) if name[0] in "mn"]
        return cls(tuple(lhs), tuple(rhs), (*batch, *free), summed)

    def __str__(self) -> str:
        lhs, rhs, out = (" ".join(f) for f in (self.lhs, self.rhs, self.out))
        return f"{lhs}, {rhs} -> {out}"


def split_over_devices(
    product: Product,
    factors: Factorization,
    out_dtype: Any,
    around: AbstractMesh | None = None,
) -> Product:
    """`product` with rules for the partitioner and for `vmap`.

    Args:
        product: `(lhs, rhs, out_dtype)` to the product of two arrays, also of shards of
            them.
        factors: names of the dimensions.
        out_dtype: of the result.
        around: what `mesh_around` gives where the result is called.
    """

    def whole(lhs: jax.Array, rhs: jax.Array, *_: jax.Array) -> jax.Array:
        return product(lhs, rhs, out_dtype)

    def partition(mesh: Any, args: Any, out: Any) -> Any:
        lhs, rhs, *rest = args
        free, unsplit = mesh, ()
        if around is not None:
            mesh, free = around, partitioned_mesh(around, rest[0].sharding)
            if free is None:  # No sum could say which devices it is over.
                free, unsplit = free_mesh(around), factors.summed
        axes = assign_axes(factors, *(_spec(x, free) for x in (lhs, rhs, out)))
        axes = _even(axes, dict(free.shape), factors, (lhs, rhs))
        axes.update(dict.fromkeys(unsplit, ()))
        summed = tuple(axis for name in factors.summed for axis in axes[name])

        @_without_mesh
        def shard(lhs: jax.Array, rhs: jax.Array, *_: jax.Array) -> jax.Array:
            out = lowered_once(product)(lhs, rhs, out_dtype)
            return lax.psum(out, summed) if summed else out

        shardings = [
            NamedSharding(free, PartitionSpec(*(axes[name] or None for name in names)))
            for names in (factors.lhs, factors.rhs, factors.out)
        ]
        kept = (x.sharding for x in rest)
        return mesh, shard, shardings[2], (*shardings[:2], *kept)

    rule = str(factors)
    if around is not None:
        rule = rule.replace(" ->", f", {' '.join(free_axes(around))} ->")
    partitioned = custom_partitioning(whole)
    partitioned.def_partition(
        partition, sharding_rule=rule, reduction_factors=factors.summed
    )

    def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if around is None:
            return partitioned(lhs, rhs)
        return partitioned(lhs, rhs, compass(around))

    mappable = jax.custom_batching.custom_vmap(run)

    @functools.cache
    def over(is_mapped: tuple[bool, ...]) -> Product:
        in_axes = tuple(0 if mapped else None for mapped in is_mapped)

        def mapped(lhs: jax.Array, rhs: jax.Array, dtype: Any) -> jax.Array:
            return jax.vmap(lambda x, w: product(x, w, dtype), in_axes)(lhs, rhs)

        return split_over_devices(mapped, factors.mapped(is_mapped), out_dtype, around)

    @mappable.def_vmap
    def _vmap(axis_size: int, is_mapped: Sequence[bool], *args: jax.Array) -> Any:
        # A rule of its own: without one, XLA would gather operands for the kernels.
        del axis_size
        return over(tuple(is_mapped))(*args), True

    return mappable


def _without_mesh(shard: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`shard`, traced as the program of one device.

    NOTE: the partitioner calls while the caller's mesh is still in context. Where that
    is explicit, every array would come with a sharding, and XLA cannot compile those
    any more.
    """

    def run(*args: jax.Array) -> jax.Array:
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jaxpr = jax.make_jaxpr(jax.jit(shard))(*avals)
        return core.jaxpr_as_fun(jaxpr)(*args)[0]

    return run


def _spec(x: Any, mesh: Any) -> tuple[tuple[str, ...], ...]:
    """The axes of `mesh` that split each dimension."""
    spec = tuple(_compat.spec_on(mesh, x.sharding))
    spec += (None,) * (len(x.shape) - len(spec))
    return tuple(
        () if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec
    )


def _even(
    axes: dict[str, tuple[str, ...]],
    mesh_shape: dict[str, int],
    factors: Factorization,
    args: Sequence[Any],
) -> dict[str, tuple[str, ...]]:
    """`axes` without those that would leave a padded shard: its padding is garbage."""
    sizes = {}
    for names, x in zip((factors.lhs, factors.rhs), args, strict=True):
        sizes.update(zip(names, x.shape, strict=True))
    shards = {name: math.prod(mesh_shape[a] for a in axes[name]) for name in axes}
    return {
        name: axes[name] if sizes[name] % shards[name] == 0 else () for name in axes
    }


def assign_axes(
    factors: Factorization, lhs: Any, rhs: Any, out: Any
) -> dict[str, tuple[str, ...]]:
    """Which mesh axes split which dimension while the product is computed.

    An axis splits the dimension that two of the three arrays agree on: there is at
    most one, for any two dimensions have an array in common. Where no two agree, the
    result's sharding comes first, then that of `lhs`.

    Args:
        factors: names of the dimensions.
        lhs, rhs, out: mesh axes of each dimension, as the partitioner has them.
    """
    arrays = ((factors.out, out), (factors.lhs, lhs), (factors.rhs, rhs))
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for names, spec in arrays:
        for name, axes in zip(names, spec, strict=True):
            for axis in axes:
                votes[axis][name] += 1
    assigned: dict[str, tuple[str, ...]]
    assigned = {name: () for names, _ in arrays for name in names}
    for axis, names in votes.items():  # In order of `arrays`, and so are ties.
        assigned[names.most_common(1)[0][0]] += (axis,)
    return assigned
