"""Which backward product is the gradient of which forward product's operand."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

from fp8jax.transform.analysis._values import SIDES, Dot, Side, Value, other_side


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A backward product `x dout`, the gradient of a forward product's operand.

    Attributes:
        dot: the backward product.
        x_side: which of its operands was one of the forward product, too.
        forward: the forward product, or its recomputation.
        side: the operand of `forward` that this is the gradient of.
    """

    dot: Dot
    x_side: Side
    forward: Dot
    side: Side


_Key = TypeVar("_Key")
_Operands: TypeAlias = dict[_Key, list[tuple[Dot, Side]]]


def gradients(dots: Sequence[Dot], batched: bool = False) -> Iterator[Gradient]:
    """All pairs of a backward product and the forward product that it belongs to.

    The gradients of `y = a b` are `a dy` and `dy b`. So a backward product is known by
    the operand it shares with a forward one; and where several share it, as with a
    weight used twice, by what else the same cotangent is multiplied by.

    Args:
        dots: of the whole function.
        batched: whether to look at products with batch dimensions, such as those of
            experts, instead of those without.
    """
    by_operand: _Operands[int] = collections.defaultdict(list)
    by_sizes: _Operands[tuple[int, int, int]] = collections.defaultdict(list)
    backward: list[tuple[Dot, Side]] = []
    # What each cotangent is multiplied by.
    partners: dict[int, set[tuple[str, int]]] = collections.defaultdict(set)
    for dot, side in operands_of(dots, batched):
        x, y = dot.operand(side), dot.operand(other_side(side))
        if dot.scope.phase in ("forward", "recompute"):
            by_operand[x.root].append((dot, side))
            by_sizes[sizes_of(dot, side)].append((dot, side))
        elif dot.scope.phase == "backward" and y.cotangent:
            partners[y.root] |= _names(x)
            backward.append((dot, side))

    for dot, x_side in backward:
        x, dout = dot.operand(x_side), dot.operand(other_side(x_side))
        sizes = gradient_sizes(dot, x_side)
        shares = [f for f in by_operand[x.root] if sizes_of(*f) == sizes]
        others = partners[dout.root] - _names(x)
        if not shares:  # A copy that we failed to recognize as one.
            shares = [f for f in by_sizes[sizes] if _meets(*f, others)]
        shares = [f for f in shares if _meets(*f, others)] or shares
        here = dot.scope.within.scope
        if here:
            same_scope = [f for f in shares if f[0].scope.within.scope == here]
            shares = same_scope or shares
        for forward, side in shares:
            yield Gradient(dot, x_side, forward, other_side(side))


def operands_of(
    dots: Sequence[Dot], batched: bool = False
) -> Iterator[tuple[Dot, Side]]:
    """Both operands of every product that nothing around it forbids to rewrite.

    Args:
        dots: of the whole function.
        batched: whether of those with batch dimensions, or of those without.
    """
    for dot in dots:
        if _is_plain(dot) and dot.has_batch == batched:
            for side in SIDES:
                yield dot, side


def sizes_of(dot: Dot, side: Side) -> tuple[int, int, int]:
    """Elements of one operand, of the other, and of the result."""
    return dot.aval(side).size, dot.aval(other_side(side)).size, dot.out_aval.size


def gradient_sizes(dot: Dot, x_side: Side) -> tuple[int, int, int]:
    """`sizes_of` of the forward product: the result here has the other's size there."""
    x, dout, out = sizes_of(dot, x_side)
    return x, out, dout


def _names(x: Value) -> set[tuple[str, int]]:
    names = {("value", x.root)}
    return names if x.only_leaf is None else names | {("leaf", x.only_leaf)}


def _meets(forward: Dot, side: Side, partners: set[tuple[str, int]]) -> bool:
    """Whether the other operand is multiplied by the same cotangent."""
    return not partners.isdisjoint(_names(forward.operand(other_side(side))))


def _is_plain(dot: Dot) -> bool:
    return dot.is_product and dot.scope.blocked is None
