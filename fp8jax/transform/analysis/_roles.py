"""Tells what each product is in a step: fprop, dgrad, wgrad, recomputation, other."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from fp8jax.transform.analysis._gradients import gradients
from fp8jax.transform.analysis._known_weights import Parameters
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
CLOSED_OVER = (
    "by an array that the function closes over, a constant of the program: if it is a "
    "weight, make its model or the tree of parameters an argument"
)
CLOSED_OVER_BACKWARD = "gradient of a product by an array that the function closes over"
UNCLEAR = "ambiguous: gradient of several layers that have different rules"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What one product is.

    Attributes:
        dot: the product.
        role: in the step.
        weight: index of the leaf that it multiplies by or is the gradient of.
        side: which operand is the weight, or, for wgrad, the activation.
        layers: the leaves of the weight: several, if the step puts them side by side;
            for wgrad, of all layers that it may be the gradient of, if the program
            does not tell them apart.
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
    dots: Sequence[Dot], is_float: Sequence[bool], updated: int
) -> tuple[int, int]:
    """Leaves that a forward product multiplies by and the step has a gradient of.

    Args:
        dots: of the whole step.
        is_float: for each leaf.
        updated: `Value.leaves` of what gradients went into.

    Returns:
        `Value.leaves` of those whose gradient is nothing else's, and of all others that
        a backward product may be the gradient of: of one of several.
    """
    floats = sum(1 << i for i, x in enumerate(is_float) if x)
    operands: dict[Position, set[Value]] = collections.defaultdict(set)
    # One backward product may be the gradient of several: of the layers that share it.
    for gradient in (*gradients(dots), *gradients(dots, batched=True)):
        operand = gradient.forward.operand(gradient.side)
        operands[gradient.dot.position].add(operand)
    sure = unsure = 0
    for several in operands.values():
        known = maybe = 0
        for operand in several:
            one, other = _trained(operand, updated)
            known, maybe = known | one, maybe | other
        # One value, though it may be read as several: a weight used twice is sure.
        if len({operand.root for operand in several}) == 1:
            sure |= known & floats
        unsure |= (known | maybe) & floats
    return sure, unsure & ~sure


def _trained(x: Value, updated: int) -> tuple[int, int]:
    """Leaves that an operand's gradient is that of, surely and perhaps."""
    if x.only_leaf is not None:
        return x.leaves, 0
    # What else it was made of, as a mask or what a norm's gain scales, has none.
    sure = x.versions & updated
    return (sure, 0) if sure or x.others else (0, x.versions)


def assign(dots: Sequence[Dot], parameters: Parameters) -> list[Assignment]:
    """Assigns a role to every product.

    Args:
        dots: of the whole function.
        parameters: among its leaves.
    """
    whole_step = is_whole_step(dots)
    second_order = is_second_order(dot.scope.within for dot in dots)

    def role_of(dot: Dot) -> Assignment:
        phase = dot.scope.phase
        if dot.primitive == MARKED:
            return _marked(dot, len(parameters.sizes))
        if second_order:
            return Assignment(dot, "other", reason=SECOND_ORDER)
        # Wgrads among them are found below: they have no parameter for an operand.
        if phase == "backward":
            return _dgrad(dot, parameters)
        # In a forward function all is outside: its callers differentiate it.
        if phase == "outside" and whole_step:
            return Assignment(dot, "other", reason=OUTSIDE)
        role = "recompute" if phase == "recompute" else "fprop"
        return _forward(dot, parameters, role)

    assigned = [role_of(dot) for dot in dots]
    if any(a.reason == CLOSED_OVER for a in assigned):
        assigned = [_of_closed_over(a) for a in assigned]
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


def _forward(dot: Dot, parameters: Parameters, role: Role) -> Assignment:
    pure: list[Side] = [s for s in SIDES if parameters.is_pure(dot.operand(s))]
    sides: list[Side] = pure
    if len(sides) == 2:  # A parameter itself beats what was computed from some.
        sides = [s for s in sides if dot.operand(s).only_leaf is not None]
    if not pure:
        sides = [s for s in SIDES if parameters.is_derived(dot.operand(s))]
    if len(sides) == 1:
        return _layer(dot, role, sides[0], parameters)
    if sides or len(pure) == 2:
        return Assignment(dot, "other", reason=TWO_WEIGHTS)
    if any(parameters.is_closed_over(dot.operand(side)) for side in SIDES):
        return Assignment(dot, "other", reason=CLOSED_OVER)
    found = [dot.operand(side).only_leaf for side in SIDES]
    suspects = tuple(x for x in found if x is not None and x < len(parameters.sizes))
    reason = NO_WEIGHT if parameters.mask else UNKNOWN_WEIGHTS
    return Assignment(dot, "other", reason=reason, suspects=suspects)

    # Without a cotangent beside it, a parameter in the backward pass is multiplied in
    # what a hand-written rule computes again.


def _dgrad(dot: Dot, parameters: Parameters) -> Assignment:
    against: list[Side] = [s for s in SIDES if dot.operand(other_side(s)).cotangent]
    pure: list[Side] = [s for s in against if parameters.is_pure(dot.operand(s))]
    derived: list[Side] = [s for s in against if parameters.is_derived(dot.operand(s))]
    sides = pure or derived
    if len(sides) == 1:
        return _layer(dot, "dgrad", sides[0], parameters)
    reason = NO_WEIGHT_BACKWARD if parameters.mask else UNKNOWN_WEIGHTS
    return Assignment(dot, "other", reason=reason)


def _layer(dot: Dot, role: Role, side: Side, parameters: Parameters) -> Assignment:
    """The assignment of a product by a weight, on this side."""
    layers = parameters.layers(dot.operand(side))
    return Assignment(dot, role, layers[0], side, layers)


def _of_closed_over(a: Assignment) -> Assignment:
    """The assignment, where the arrays in a closure are the ones to look at."""
    unknown = a.reason == UNKNOWN_WEIGHTS and a.dot.scope.phase == "backward"
    return dataclasses.replace(a, reason=CLOSED_OVER_BACKWARD) if unknown else a


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
            gradient.dot, "wgrad", layer.weight, gradient.x_side, layer.layers
        )
        found[position] = _merged(found.get(position, new), new)
    return found


def _merged(a: Assignment, b: Assignment) -> Assignment:
    """One assignment for a product that may belong to several layers."""
    if a.side != b.side:
        return Assignment(a.dot, "other", reason=UNCLEAR)
    return dataclasses.replace(a, layers=tuple(dict.fromkeys((*a.layers, *b.layers))))
