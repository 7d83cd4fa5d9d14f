"""Tells what each product is in a step: fprop, dgrad, wgrad, recomputation, other."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from fp8jax.transform.analysis._gradients import gradients, operands_of
from fp8jax.transform.analysis._phases import is_second_order
from fp8jax.transform.analysis._values import (
    MARKED,
    SIDES,
    Dot,
    Side,
    Value,
    other_side,
)
from fp8jax.transform.ir import Position

Role = Literal["fprop", "dgrad", "wgrad", "recompute", "other"]

NO_WEIGHT = "no operand is a parameter (attention, or the like)"
NO_WEIGHT_BACKWARD = "gradient of a product without a parameter"
OUTSIDE = "outside differentiation: an optimizer's product, or an evaluation"
SECOND_ORDER = "second-order differentiation: left as it is"
TWO_WEIGHTS = "both operands are made of parameters: which one is the weight is unclear"
UNKNOWN_WEIGHTS = "no argument is known to hold parameters: pass weights="
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
        suspects: leaves that would be the weight, were they known to be parameters.
    """

    dot: Dot
    role: Role
    weight: int | None = None
    side: Side | None = None
    layers: tuple[int, ...] = ()
    reason: str = ""
    suspects: tuple[int, ...] = ()


def is_whole_step(dots: Sequence[Dot]) -> bool:
    """Whether the function holds a backward pass."""
    return any(dot.scope.phase == "backward" for dot in dots)


def differentiated_leaves(
    dots: Sequence[Dot], is_float: Sequence[bool]
) -> tuple[int, int]:
    """Leaves that a forward product multiplies by and the step has a gradient of.

    Returns:
        `Value.leaves` of those whose gradient is nothing else's, and of all others that
        a backward product may be the gradient of: of one of several.
    """
    operands: dict[Position, set[Value]] = collections.defaultdict(set)
    # One backward product may be the gradient of several: of the layers that share it.
    for gradient in gradients(dots):
        operand = gradient.forward.operand(gradient.side)
        operands[gradient.dot.position].add(operand)
    sure = unsure = 0
    for several in operands.values():
        leaves = 0
        for operand in several:
            leaf = operand.only_leaf
            if leaf is not None and leaf < len(is_float) and is_float[leaf]:
                leaves |= 1 << leaf
        # One value, though it may be read as several: a weight used twice is sure.
        if len({operand.root for operand in several}) == 1:
            sure |= leaves
        else:
            unsure |= leaves
    return sure, unsure & ~sure


def forward_leaves(dots: Sequence[Dot]) -> int:
    """Leaves that, cast or sliced at most, some forward product multiplies by."""
    found = 0
    for dot, side in operands_of(dots):
        leaf = dot.operand(side).only_leaf
        if leaf is not None and dot.scope.phase in ("forward", "recompute"):
            found |= 1 << leaf
    return found


def assign(
    dots: Sequence[Dot], weights: int, leaf_sizes: Sequence[int]
) -> list[Assignment]:
    """Assigns a role to every product.

    Args:
        dots: of the whole function.
        weights: `Value.leaves` of the parameters.
        leaf_sizes: elements of each leaf.
    """
    whole_step = is_whole_step(dots)
    second_order = is_second_order(dot.scope.within for dot in dots)

    def role_of(dot: Dot) -> Assignment:
        phase = dot.scope.phase
        if dot.primitive == MARKED:
            return _marked(dot, len(leaf_sizes))
        if second_order:
            return Assignment(dot, "other", reason=SECOND_ORDER)
        # Wgrads among them are found below: they have no parameter for an operand.
        if phase == "backward":
            return _dgrad(dot, weights, leaf_sizes)
        # In a forward function all is outside: its callers differentiate it.
        if phase == "outside" and whole_step:
            return Assignment(dot, "other", reason=OUTSIDE)
        role = "recompute" if phase == "recompute" else "fprop"
        return _forward(dot, weights, leaf_sizes, role)

    assigned = [role_of(dot) for dot in dots]
    wgrads = _wgrads(dots, assigned)
    return [wgrads.get(a.dot.position, a) for a in assigned]


def _marked(dot: Dot, n_leaves: int) -> Assignment:
    """One of our own products: what is in blocks is the weight, and wgrad has none."""
    role: Role = "recompute" if dot.scope.phase == "recompute" else "fprop"
    if dot.scope.phase == "backward":
        role = "wgrad" if dot.blocked is None else "dgrad"
    # Tiles of one row on both sides do not tell which one is the weight.
    if dot.blocked is None:
        return Assignment(dot, role)
    leaf = dot.operand(dot.blocked).only_leaf
    known = leaf is not None and leaf < n_leaves
    return Assignment(dot, role, leaf if known else None, dot.blocked)


def _forward(
    dot: Dot, weights: int, leaf_sizes: Sequence[int], role: Role
) -> Assignment:
    sides: list[Side] = [side for side in SIDES if _is_weight(dot, side, weights)]
    if len(sides) == 2:  # A parameter itself beats what was computed from some.
        sides = [s for s in sides if dot.operand(s).only_leaf is not None]
    if len(sides) == 1:
        leaf = _largest(dot.operand(sides[0]).leaves, leaf_sizes)
        return Assignment(dot, role, leaf, sides[0])
    if sides or all(_is_weight(dot, side, weights) for side in SIDES):
        return Assignment(dot, "other", reason=TWO_WEIGHTS)
    found = [dot.operand(side).only_leaf for side in SIDES]
    suspects = tuple(x for x in found if x is not None and x < len(leaf_sizes))
    reason = NO_WEIGHT if weights else UNKNOWN_WEIGHTS
    return Assignment(dot, "other", reason=reason, suspects=suspects)


def _dgrad(dot: Dot, weights: int, leaf_sizes: Sequence[int]) -> Assignment:
    # Without a cotangent beside it, a parameter in the backward pass is multiplied in
    # what a hand-written rule computes again.
    sides: list[Side] = [
        side
        for side in SIDES
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
    # Apart, so that none of an expert's products stands for one that may be in FP8.
    for gradient in (*gradients(dots), *gradients(dots, batched=True)):
        layer = layers.get(gradient.forward.position)
        position = gradient.dot.position
        # The gradient of the other operand is no wgrad, and what is known as dgrad, by
        # the parameter in it, stays that.
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
    # Of a fused weight and its bias or scale, the weight names the layer.
    members = [i for i, _ in enumerate(leaf_sizes) if leaves >> i & 1]
    return max(members, key=lambda i: leaf_sizes[i])
