"""Which sharded products may share codes: by what is known of the mesh in a trace."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

from fp8jax import _compat, ops
from fp8jax.quant import QuantSpec
from fp8jax.transform.analysis import Dot
from fp8jax.transform.plan._decisions import QuantizedDot


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a trace knows of the mesh that arrays are split over.

    Attributes:
        axes: the sizes of its axes, by name.
        of_batches: the axes that split the function's batches. What they split of a
            weight is gathered for its products, as in FSDP.
        of_entries: those of them that split no sequence, but batches into entries.
    """

    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    of_batches: frozenset[str] = frozenset()
    of_entries: frozenset[str] = frozenset()

    def cut(self, size: int, tile: int, whole: Collection[str]) -> bool:
        """Whether the axes may cut tiles of a dimension where a product is computed.

        Args:
            size: of the dimension.
            tile: how much of it has one scale.
            whole: axes that leave it whole there.
        """
        axes = [count for name, count in self.axes.items() if name not in whole]
        return any(size % n == 0 and size % (n * tile) for n in _products(axes))


def _products(sizes: Iterable[int]) -> set[int]:
    found = {1}
    for size in sizes:
        found |= {size * n for n in found}
    return found - {1}


def shares_codes(what: QuantizedDot, dot: Dot, splits: Splits) -> bool:
    """Whether the operands of a sharded product are quantized apart from it.

    Not where tiles would not lie in one dimension, or where a shard's edge would cut
    them: there the product quantizes what each device has, in tiles of its own.
    """
    # NOTE: types of codes on an explicit mesh are derived by no rule yet.
    if _compat.is_explicit(dot.out_aval):
        return False
    shapes = dot.lhs_aval.shape, dot.rhs_aval.shape
    layout = ops.plan(*shapes, dot.dimension_numbers, "fp8_transform")
    operands = layout.lhs, layout.rhs
    for operand, shape, spec in zip(
        operands, shapes, (what.lhs_spec, what.rhs_spec), strict=True
    ):
        if not ops.has_split_codes(operand, shape, spec):
            return False
        for size, tile, contracted in _tiled(operand, shape, spec):
            whole = splits.of_batches
            if contracted and what.role == "wgrad":
                # Tokens, of which each device has its own: entries, or parts of them.
                several = operand.ranks[1 + operand.contraction] > 1
                whole = splits.of_entries if several else frozenset()
            if splits.cut(size, tile, whole):
                return False
    return True


def _tiled(
    operand: ops.Operand, shape: tuple[int, ...], spec: QuantSpec
) -> Iterator[tuple[int, int, bool]]:
    """The dimensions that tiles span more than 1 of: size, tile, whether contracted."""
    arranged = [shape[d] for d in operand.permutation]
    batch, rows, _ = operand.ranks
    last = arranged[batch + rows - 1], arranged[-1]
    by_side = last if operand.contraction == 1 else last[::-1]
    for i, (size, tile) in enumerate(zip(by_side, spec.tile, strict=True)):
        if tile > 1:
            yield size, tile, i == 1
