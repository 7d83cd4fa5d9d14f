"""Which product is what in a train step: fprop, dgrad, wgrad, recomputation, other."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

from fp8jax.transform._values import (
    Dot,
    Position,
    Side,
    Value,
    is_second_order,
    other_side,
    scope_name,
)

Role = Literal["fprop", "dgrad", "wgrad", "recompute", "other"]

_SIDES: tuple[Side, Side] = ("lhs", "rhs")

NO_WEIGHT = "no operand is a parameter: attention, or another product of activations"
NO_WEIGHT_BACKWARD = "gradient of a product without a parameter"
OUTSIDE = "outside differentiation: an optimizer's product, or an evaluation"
SECOND_ORDER = "second-order differentiation: left as it is"
TWO_WEIGHTS = "both operands are made of parameters: which one is the weight is unclear"
UNKNOWN_WEIGHTS = "no parameters known: pass weights="
UNCLEAR = "ambiguous: gradient of several layers that have different rules"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What one product is.

    Attributes:
        dot: the product.
        role: in the step.
        weight: index of the leaf that it multiplies by or is the gradient of.
        side: which operand is the weight, or, for wgrad, the activation.
        layers: for wgrad, the leaves of all layers that it may be the gradient of;
            more than one only if the program does not tell them apart.
        reason: why the role is "other".
        suspect: a leaf that would be the weight, were it known to be a parameter.
    """

    dot: Dot
    role: Role
    weight: int | None = None
    side: Side | None = None
    layers: tuple[int, ...] = ()
    reason: str = ""
    suspect: int | None = None


@dataclasses.dataclass(frozen=True)
class _Gradient:
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


def _gradients(dots: Sequence[Dot]) -> Iterator[_Gradient]:
    """All pairs of a backward product and the forward product that it belongs to.

    The gradients of `y = a b` are `a dy` and `dy b`. So a backward product is known by
    the operand it shares with a forward one; and where several share it, as with a
    weight used twice, by what else the same cotangent is multiplied by.
    """
    by_operand: _Operands[int] = collections.defaultdict(list)
    by_sizes: _Operands[tuple[int, int, int]] = collections.defaultdict(list)
    backward: list[tuple[Dot, Side]] = []
    # What each cotangent is multiplied by.
    partners: dict[int, set[tuple[str, int]]] = collections.defaultdict(set)
    for dot, side in _sides_of(dots):
        x, y = dot.operand(side), dot.operand(other_side(side))
        if dot.scope.phase in ("forward", "recompute"):
            by_operand[x.root].append((dot, side))
            by_sizes[_sizes(dot, side)].append((dot, side))
        elif dot.scope.phase == "backward" and y.cotangent:
            partners[y.root] |= _names(x)
            backward.append((dot, side))

    for dot, x_side in backward:
        x, dout = dot.operand(x_side), dot.operand(other_side(x_side))
        sizes = _gradient_sizes(dot, x_side)
        shares = [f for f in by_operand[x.root] if _sizes(*f) == sizes]
        others = partners[dout.root] - _names(x)
        if not shares:  # A copy that we failed to recognize as one.
            shares = [f for f in by_sizes[sizes] if _meets(*f, others)]
        shares = [f for f in shares if _meets(*f, others)] or shares
        here = scope_name(dot.scope.stack)
        if here:
            same_scope = [f for f in shares if scope_name(f[0].scope.stack) == here]
            shares = same_scope or shares
        for forward, side in shares:
            yield _Gradient(dot, x_side, forward, other_side(side))


def _sides_of(dots: Sequence[Dot]) -> Iterator[tuple[Dot, Side]]:
    for dot in dots:
        if _is_plain(dot) and not dot.has_batch:
            for side in _SIDES:
                yield dot, side


def _sizes(dot: Dot, side: Side) -> tuple[int, int, int]:
    """Elements of one operand, of the other, and of the result."""
    return dot.aval(side).size, dot.aval(other_side(side)).size, dot.out_aval.size


def _gradient_sizes(dot: Dot, x_side: Side) -> tuple[int, int, int]:
    """`_sizes` of the forward product: the result here has the other's size there."""
    x, dout, out = _sizes(dot, x_side)
    return x, out, dout


def _names(x: Value) -> set[tuple[str, int]]:
    names = {("value", x.root)}
    return names if x.only_leaf is None else names | {("leaf", x.only_leaf)}


def _meets(forward: Dot, side: Side, partners: set[tuple[str, int]]) -> bool:
    """Whether the other operand is multiplied by the same cotangent."""
    return not partners.isdisjoint(_names(forward.operand(other_side(side))))


def _is_plain(dot: Dot) -> bool:
    return dot.primitive == "dot_general" and dot.scope.blocked is None


def is_whole_step(dots: Sequence[Dot]) -> bool:
    """Whether the function holds a backward pass."""
    return any(dot.scope.phase == "backward" for dot in dots)


def differentiated_leaves(dots: Sequence[Dot], is_float: Sequence[bool]) -> int:
    """Leaves that a forward product multiplies by and the step has a gradient of.

    Returns:
        `Value.leaves` of them all.
    """
    found = 0
    for gradient in _gradients(dots):
        leaf = gradient.forward.operand(gradient.side).only_leaf
        if leaf is not None and leaf < len(is_float) and is_float[leaf]:
            found |= 1 << leaf
    return found


def forward_leaves(dots: Sequence[Dot]) -> int:
    """Leaves that, cast or sliced at most, some forward product multiplies by."""
    found = 0
    for dot in dots:
        if dot.scope.phase in ("forward", "recompute"):
            for side in _SIDES:
                leaf = dot.operand(side).only_leaf
                found |= 0 if leaf is None else 1 << leaf
    return found


def assign(
    dots: Sequence[Dot], weights: int, leaf_sizes: Sequence[int]
) -> list[Assignment]:
    """The role of every product.

    Args:
        dots: of the whole function.
        weights: `Value.leaves` of the parameters.
        leaf_sizes: elements of each leaf.
    """
    if not is_whole_step(dots):
        by_phase = dict.fromkeys(get_args(Phase), "fprop")
    if any(is_second_order(dot.scope.stack) for dot in dots):
        return [Assignment(dot, "other", reason=SECOND_ORDER) for dot in dots]
    by_phase = {
        "outside": lambda dot: Assignment(dot, "other", reason=OUTSIDE),
        "forward": lambda dot: _forward(dot, weights, leaf_sizes, "fprop"),
        "recompute": lambda dot: _forward(dot, weights, leaf_sizes, "recompute"),
        "backward": lambda dot: _dgrad(dot, weights, leaf_sizes),
    }
    assigned = [by_phase[dot.scope.phase](dot) for dot in dots]
    wgrads = _wgrads(dots, assigned)
    return [wgrads.get(a.dot.position, a) for a in assigned]


def _forward(
    dot: Dot, weights: int, leaf_sizes: Sequence[int], role: Role
) -> Assignment:
    sides: list[Side] = [side for side in _SIDES if _is_weight(dot, side, weights)]
    if len(sides) == 2:  # A parameter itself beats what was computed from some.
        sides = [s for s in sides if dot.operand(s).only_leaf is not None]
    if len(sides) == 1:
        leaf = _largest(dot.operand(sides[0]).leaves, leaf_sizes)
        return Assignment(dot, role, leaf, sides[0])
    if sides or all(_is_weight(dot, side, weights) for side in _SIDES):
        return Assignment(dot, "other", reason=TWO_WEIGHTS)
    reason = NO_WEIGHT if weights else UNKNOWN_WEIGHTS
    return Assignment(dot, "other", reason=reason)


def _dgrad(dot: Dot, weights: int, leaf_sizes: Sequence[int]) -> Assignment:
    sides: list[Side] = [
        side
        for side in _SIDES
        if _is_weight(dot, side, weights) and dot.operand(other_side(side)).cotangent
    ]
    if len(sides) == 1:
        leaf = _largest(dot.operand(sides[0]).leaves, leaf_sizes)
        return Assignment(dot, "dgrad", leaf, sides[0])
    reason = NO_WEIGHT_BACKWARD if weights else UNKNOWN_WEIGHTS
    return Assignment(dot, "other", reason=reason)


def _wgrads(
    dots: Sequence[Dot], assigned: Sequence[Assignment]
) -> Mapping[Position, Assignment]:
    """Gradients of the weights of forward products, by position."""
    layers = {a.dot.position: a for a in assigned if a.role in ("fprop", "recompute")}
    taken = {a.dot.position for a in assigned if a.role == "dgrad"}
    found: dict[Position, Assignment] = {}
    for gradient in _gradients(dots):
        layer = layers.get(gradient.forward.position)
        position = gradient.dot.position
        if layer is None or layer.side != gradient.side or position in taken:
            continue
        assert layer.weight is not None, "layers have weights"
        new = Assignment(
            gradient.dot, "wgrad", layer.weight, gradient.x_side, (layer.weight,)
        )
        found[position] = _merged(found.get(position, new), new)
    return found


def _merged(a: Assignment, b: Assignment) -> Assignment:
    """One assignment for a product that may belong to several layers."""
    if a.side != b.side:
        return Assignment(a.dot, "other", reason=UNCLEAR)
    return dataclasses.replace(a, layers=tuple(dict.fromkeys((*a.layers, *b.layers))))


def _is_weight(dot: Dot, side: Side, weights: int) -> bool:
    value = dot.operand(side)
    return value.leaves != 0 and not value.leaves & ~weights and not value.cotangent


def _largest(leaves: int, leaf_sizes: Sequence[int]) -> int:
    members = [i for i, _ in enumerate(leaf_sizes) if leaves >> i & 1]
    return max(members, key=lambda i: leaf_sizes[i])
