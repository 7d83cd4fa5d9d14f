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
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from fp8jax import _compat
from fp8jax._version import __version__
from fp8jax.matmul import has_gpu_kernels
from fp8jax.ops._partly_manual import compass, free_axes, free_mesh, partitioned_mesh

Factors = tuple[str, ...]  # One name for each dimension of an array.
Product = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The dimensions of an operation's arrays by name: equal names, equal dimensions.

    Attributes:
        operands, results: names of each array's dimensions.
        summed: names over which results are sums: no result has them.
        whole: names of dimensions of which each device needs all.
        multiples: for some names, what a device's part is a multiple of.
        follows: for names of scales' dimensions, that of the codes they belong to, and
            how many of these have one scale.
        tiles: for names of codes' dimensions that are whole tiles, how long those are:
            the partitioner then knows which scales a part of them has.
        moves_results: whether operands stay where they are, rather than follow the
            result: of quantizations, whose results are smaller.
    """

    operands: tuple[Factors, ...]
    results: tuple[Factors, ...]
    summed: Factors = ()
    whole: Factors = ()
    multiples: tuple[tuple[str, int], ...] = ()
    follows: tuple[tuple[str, str, int], ...] = ()
    tiles: tuple[tuple[str, int], ...] = ()
    moves_results: bool = False

    def mapped(self, is_mapped: Sequence[bool]) -> "Factorization":
        """Of the operation mapped over a new first dimension of some operands."""
        name = f"v{sum(factor[0] == 'v' for factor in self.results[0])}"
        operands = tuple(
            (name, *names) if mapped else names
            for names, mapped in zip(self.operands, is_mapped, strict=True)
        )
        results = tuple((name, *names) for names in self.results)
        return dataclasses.replace(self, operands=operands, results=results)

    @classmethod
    def of(cls, lhs_rank: int, rhs_rank: int, numbers: Any) -> "Factorization":
        """Of a `dot_general`."""
        (l_sum, r_sum), (l_batch, r_batch) = numbers
        lhs = [f"m{i}" for i in range(lhs_rank)]
        rhs = [f"n{i}" for i in range(rhs_rank)]
        for name, l_dims, r_dims in (("k", l_sum, r_sum), ("b", l_batch, r_batch)):
            for i, (left, right) in enumerate(zip(l_dims, r_dims, strict=True)):
                lhs[left] = rhs[right] = f"{name}{i}"
        batch = tuple(lhs[d] for d in l_batch)
        summed = tuple(lhs[d] for d in l_sum)
        free = [name for name in (*lhs, *rhs) if name[0] in "mn"]
        return cls((tuple(lhs), tuple(rhs)), ((*batch, *free),), summed)

    @property
    def leaders(self) -> dict[str, str]:
        """Of each dimension of scales, that of the codes."""
        return {name: leader for name, leader, _ in self.follows}

    def in_rule(self, name: str) -> str:
        """What a dimension is called in the partitioner's rule."""
        in_tiles = dict(self.tiles)
        for follower, leader, side in self.follows:
            if follower == name:
                if side == 1:
                    return self.in_rule(leader)
                # Else the partitioner can't tell: how many there are is rounded up.
                return f"{leader}t" if leader in in_tiles else name
        return f"({name}t {name}i)" if name in in_tiles else name

    def factors(self, names: Factors) -> Factors:
        """The factors of some dimensions in the partitioner's rule."""
        joined = " ".join(map(self.in_rule, names))
        return tuple(joined.replace("(", "").replace(")", "").split())

    def told(
        self, axes: Iterable[int], shapes: Sequence[Sequence[int]]
    ) -> "Factorization":
        """With those `tiles` alone that no split over a mesh can cut.

        What else the partitioner made of an axis it would split in two: one part for
        tiles, and one within them.

        Args:
            axes: sizes of the mesh's axes.
            shapes: of the operands.
        """
        splits = {1}
        for size in axes:
            splits |= {size * split for split in splits}
        sizes: dict[str, int] = {}
        for names, shape in zip(self.operands, shapes, strict=False):
            sizes.update(zip(names, shape, strict=True))
        tiles = tuple(
            (name, side)
            for name, side in self.tiles
            if all(
                sizes[name] % split or sizes[name] // side % split == 0
                for split in splits
            )
        )
        return dataclasses.replace(self, tiles=tiles)

    @property
    def sizes(self) -> dict[str, int]:
        """Those sizes of factors that no dimension tells."""
        return {f"{name}i": side for name, side in self.tiles}

    def __str__(self) -> str:
        operands, results = (
            ", ".join(" ".join(map(self.in_rule, names)) for names in arrays)
            for arrays in (self.operands, self.results)
        )
        return f"{operands} -> {results}"


_NO_EXPORT = (
    "FP8 products that may be split over devices cannot be exported: how to split them "
    "is asked of this process while XLA compiles. Export the step of one device, or "
    "with its products in a jax.shard_map over the whole mesh."
)


def named(*key: Any) -> str:
    """A name for a function that says by a digest all that it depends on.

    XLA's partitioner sees a product as a call of no content. Programs that differ in
    nothing else must differ in a name, or JAX's persistent cache takes one for another.

    Args:
        key: values whose `repr` is the same in every process.
    """
    text = repr((__version__, key))
    return f"fp8jax_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def split_over_devices(
    product: Product,
    factors: Factorization,
    name: str,
    around: AbstractMesh | None = None,
    across: Callable[[Mapping[str, tuple[str, ...]]], Product] | None = None,
) -> Product:
    """`product` with rules for the partitioner and for `vmap`.

    Args:
        product: a function of arrays, also of shards of them, to an array or, of
            several results, a tuple. Parts of a sum are in the dtype of the result.
        factors: names of the dimensions.
        name: from `named`, of all that `product` depends on beside arrays.
        around: the mesh of a `shard_map` over some of its axes that it is called in.
        across: makes the product of shards whose edges cut tiles, given the axes that
            split each such dimension: its scales are then whole on each device. Without
            it no such dimension is split.
    """
    count = len(factors.operands)
    # XLA:GPU joins a sum and the slice of it that a device keeps by itself, and hides
    # more behind that than behind what is scattered here.
    scatters = not has_gpu_kernels()

    def whole(*args: jax.Array) -> Any:
        return product(*args[:count])

    def partition(mesh: Any, args: Any, out: Any) -> Any:
        arrays, rest = args[:count], args[count:]
        free, unsplit = mesh, factors.whole
        if around is not None:
            mesh, free = around, partitioned_mesh(around, rest[0].sharding)
            if free is None:  # No sum could say which devices it is over.
                free, unsplit = free_mesh(around), (*unsplit, *factors.summed)
        specs = [_spec(x, free) for x in (*arrays, *jax.tree.leaves(out))]
        axes = assign_axes(factors, *specs)
        may_cut = across is not None
        axes, cut = _allowed(axes, dict(free.shape), factors, arrays, unsplit, may_cut)
        summed = tuple(axis for name in factors.summed for axis in axes[name])
        local = across(cut) if across is not None and cut else product
        wanted = [
            _scattered(names, spec, x.shape, axes, summed, dict(free.shape))
            if scatters
            else {}
            for names, spec, x in zip(
                factors.results, specs[count:], jax.tree.leaves(out), strict=True
            )
        ]

        @_without_mesh
        def shard(*args: jax.Array) -> Any:
            out = local(*args[:count])
            parts, tree = jax.tree.flatten(out)
            sums = map(functools.partial(_summed, summed), parts, wanted)
            return jax.tree.unflatten(tree, [*sums])

        def sharding(by_dim: Iterable[tuple[str, ...]]) -> NamedSharding:
            return NamedSharding(free, PartitionSpec(*(a or None for a in by_dim)))

        operands = [sharding(axes[n] for n in names) for names in factors.operands]
        results = [
            sharding(axes[n] + scattered.get(d, ()) for d, n in enumerate(names))
            for names, scattered in zip(factors.results, wanted, strict=True)
        ]
        results = jax.tree.unflatten(jax.tree.structure(out), results)
        return mesh, shard, results, (*operands, *(x.sharding for x in rest))

    def rule(mesh: Any, operands: Sequence[Any], results: Any) -> Any:
        del results
        shapes = [x.shape for x in operands]
        known = factors.told(mesh.shape.values(), shapes)
        text = str(known)
        if around is not None:
            text = text.replace(" ->", f", {' '.join(free_axes(around))} ->")
        return text, {
            "reduction_factors": known.factors(factors.summed),
            "need_replication_factors": known.factors(factors.whole),
            **known.sizes,
        }

    partitioned = custom_partitioning(whole)
    # NOTE: not every sharding that the partitioner tries is one by axes, as JAX decodes
    # them: `_spec` does.
    partitioned.def_partition(partition, sharding_rule=rule, decode_shardings=False)

    def run(*args: jax.Array) -> Any:
        first = _compat.here_only(args[0], _NO_EXPORT)
        more = () if around is None else (compass(around),)
        return partitioned(first, *args[1:], *more)

    run.__name__ = run.__qualname__ = name
    mappable = jax.custom_batching.custom_vmap(jax.jit(run))

    @functools.cache
    def over(is_mapped: tuple[bool, ...]) -> Product:
        in_axes = tuple(0 if mapped else None for mapped in is_mapped)
        mapped = jax.vmap(product, in_axes)
        several = None
        if across is not None:
            several = functools.partial(_mapped_across, across, in_axes)
        more = factors.mapped(is_mapped)
        return split_over_devices(mapped, more, name, around, several)

    @mappable.def_vmap
    def _vmap(axis_size: int, is_mapped: Sequence[bool], *args: jax.Array) -> Any:
        # A rule of its own: without one, XLA would gather operands for the kernels.
        del axis_size
        out = over(tuple(is_mapped))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return mappable


def _scattered(
    names: Factors,
    spec: tuple[tuple[str, ...], ...],
    shape: Sequence[int],
    axes: Mapping[str, tuple[str, ...]],
    summed: tuple[str, ...],
    mesh_shape: Mapping[str, int],
) -> dict[int, tuple[str, ...]]:
    """The dimensions of a result of which a device keeps a part of the sum alone.

    Args:
        names: of the dimensions.
        spec: the axes by which those that read the result want it split.
        shape: of the result.
        axes: those that split the operation.
        summed: those that the result is a sum over.
        mesh_shape: sizes of the axes.

    Returns:
        For each such dimension, the axes of the sum that split it.
    """
    found = {}
    for d, (name, wanted) in enumerate(zip(names, spec, strict=True)):
        count = math.prod(mesh_shape[axis] for axis in wanted)
        is_part = wanted and not axes[name] and {*wanted} <= {*summed}
        if is_part and shape[d] % count == 0:
            found[d] = wanted
    return found


def _summed(
    summed: tuple[str, ...], part: jax.Array, scattered: Mapping[int, tuple[str, ...]]
) -> jax.Array:
    """The sum over devices, or the parts of it that each one keeps."""
    for d, axes in scattered.items():
        part = lax.psum_scatter(part, axes, scatter_dimension=d, tiled=True)
    done = {axis for axes in scattered.values() for axis in axes}
    rest = tuple(axis for axis in summed if axis not in done)
    return lax.psum(part, rest) if rest else part


def _mapped_across(
    across: Callable[[Mapping[str, tuple[str, ...]]], Product],
    in_axes: tuple[int | None, ...],
    cut: Mapping[str, tuple[str, ...]],
) -> Product:
    return jax.vmap(across(cut), in_axes)


def _without_mesh(shard: Product) -> Product:
    """`shard`, traced as the program of one device.

    NOTE: the partitioner calls while the caller's mesh is still in context. Where that
    is explicit, every array would come with a sharding, and XLA cannot compile those
    any more.
    """

    def run(*args: jax.Array) -> Any:
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jaxpr, out = jax.make_jaxpr(jax.jit(shard), return_shape=True)(*avals)
        results = core.jaxpr_as_fun(jaxpr)(*args)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return run


def _spec(x: Any, mesh: Any) -> tuple[tuple[str, ...], ...]:
    """The axes of `mesh` that split each dimension; () if it is no split by axes."""
    try:
        spec = tuple(_compat.spec_on(mesh, x.sharding))
    except ValueError:
        spec = ()
    spec += (None,) * (len(x.shape) - len(spec))
    return tuple(
        () if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec
    )


def _allowed(
    axes: dict[str, tuple[str, ...]],
    mesh_shape: dict[str, int],
    factors: Factorization,
    args: Sequence[Any],
    unsplit: Factors,
    may_cut: bool,
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """`axes` without those that would leave a part of what each device needs whole.

    Nor a padded shard, whose padding is garbage, nor, unless it may, one that cuts a
    tile of codes.

    Returns:
        The axes of each dimension, and of those whose tiles are cut.
    """
    sizes, multiples = {}, dict(factors.multiples)
    for names, x in zip(factors.operands, args, strict=True):
        sizes.update(zip(names, x.shape, strict=True))

    def fits(name: str, multiple: int) -> bool:
        shards = math.prod(mesh_shape[a] for a in axes[name])
        return sizes[name] % (shards * multiple) == 0

    leaders = factors.leaders
    found, cut = {}, {}
    for name in axes:
        if name in leaders:
            continue
        found[name] = ()
        if name in unsplit or not axes[name]:
            continue
        if fits(name, multiples.get(name, 1)):
            found[name] = axes[name]
        elif may_cut and fits(name, 1):
            found[name] = cut[name] = axes[name]
    for name, leader, side in factors.follows:
        found[name] = () if side > 1 and leader in cut else found[leader]
    return found, cut


def assign_axes(factors: Factorization, *specs: Any) -> dict[str, tuple[str, ...]]:
    """Which mesh axes split which dimension while the operation is computed.

    An axis splits the dimension that the most arrays agree on, and others that share no
    array with it. In a product of two, any two dimensions share one. Of dimensions with
    as many votes the result's comes first, then that of the first operand. Where
    results move, dimensions that the axis splits in operands come before all others.

    Args:
        factors: names of the dimensions.
        specs: mesh axes of each dimension of each operand and result, as the
            partitioner has them.
    """
    leaders = factors.leaders
    names = *factors.operands, *factors.results
    pairs = [*zip(names, specs, strict=True)]
    count = len(factors.operands)
    weight = len(pairs) if factors.moves_results else 1
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for i, (array, spec) in enumerate((*pairs[count:], *pairs[:count])):
        for name, axes in zip(array, spec, strict=True):
            if name not in leaders:
                for axis in axes:
                    votes[axis][name] += weight if i >= len(pairs) - count else 1
    assigned: dict[str, tuple[str, ...]]
    assigned = {name: () for array in names for name in array}
    for axis, found in votes.items():  # In order of the arrays, and so are ties.
        split: set[str] = set()
        for name, _ in found.most_common():
            if not any(name in array and split & set(array) for array in names):
                split.add(name)
                assigned[name] += (axis,)
    return assigned
