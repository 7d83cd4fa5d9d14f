"""How values flow through each construct: one rule each."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from fp8jax import _compat, numerics, ops
from fp8jax.transform.analysis._flow import Flow, FlowRule
from fp8jax.transform.analysis._lineage import (
    alternative,
    changed,
    picked,
    spread,
    updated,
)
from fp8jax.transform.analysis._loop_rules import loop_rule
from fp8jax.transform.analysis._ragged_form import of_marked, ragged_of
from fp8jax.transform.analysis._values import (
    MARKED,
    SIDES,
    Dot,
    HandWritten,
    Scope,
    Side,
    Value,
    is_inexact,
    joined,
)
from fp8jax.transform.ir import (
    CONSTRUCTS,
    Construct,
    aval_of,
    dimension_numbers,
    jaxprs_of,
    output_channels,
    primitive_of,
    signature,
)

OURS = "inside a function of fp8jax"
HAND_WRITTEN = (
    "hand-written VJP: left as it is (transform the whole step to rewrite its rules, "
    "or name it in custom_rules=)"
)
OWN_PARTITIONING = "inside custom_partitioning: left as it is"
OWN_VMAP = "inside custom_vmap_call: left as it is"

# The same numbers, possibly in another dtype or shape.
_VIEWS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
_SLICES = ("dynamic_slice", "gather", "slice", "split", "unstack")
# Why what a rule stands beside stays as it is: the rule would not agree with it.
_LEFT: dict[str, str] = {
    "derivative": HAND_WRITTEN,
    "linear": HAND_WRITTEN,
    "partitioning": OWN_PARTITIONING,
    "batching": OWN_VMAP,
}


def elementwise(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """What is known of most primitives: results are operands, changed."""
    value = changed(eqn, operands, _joined(operands, eqn, scope))
    if scope.phase == "backward":
        value = spread(value)
    elif scope.phase == "outside":
        flow.updated |= updated(eqn, operands)
    return _seen(flow, eqn, operands, value)


def _mixed(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """What is known of any primitive: results depend on all operands."""
    return _seen(flow, eqn, operands, _joined(operands, eqn, scope))


def _joined(operands: Sequence[Value], eqn: Any, scope: Scope) -> Value:
    value = joined(operands)
    # Integers have no derivatives: a loop's counter is none, where it counts backward.
    is_integer = not any(is_inexact(v.aval) for v in eqn.outvars)
    is_forward = scope.phase in ("forward", "recompute")
    cotangent = value.cotangent or (scope.phase == "backward" and not is_integer)
    return dataclasses.replace(
        value,
        cotangent=cotangent,
        residual=is_forward or (is_integer and not value.cotangent),
        others=0 if cotangent else value.others,
    )


def _seen(flow: Flow, eqn: Any, operands: Sequence[Value], value: Value) -> list[Value]:
    if any(hasattr(v.aval, "inner_aval") for v in eqn.invars):
        # What is read from a mutable array may come from anywhere.
        leaves, others = value.leaves | flow.closure, value.others | flow.closure
        value = dataclasses.replace(value, leaves=leaves, others=others)
    value = flow.readers.computed(eqn, operands, value)
    return _numbered(flow, eqn, operands, value)


def opaque(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """The rule of opaque primitives: products in their jaxprs are only reported."""
    jaxprs = jaxprs_of(eqn)
    if not jaxprs:
        return elementwise(flow, eqn, operands, scope)
    # By position: what an unknown primitive computes equals nothing else.
    number = flow.number("unknown", scope.position)
    unknown = dataclasses.replace(joined(operands), number=number, root=number)
    reason = f"inside {primitive_of(eqn)}: not handled, left as it is"
    for i, jaxpr in enumerate(jaxprs):
        inputs = [unknown] * len(_compat.open_jaxpr(jaxpr).invars)
        flow.walk(jaxpr, inputs, scope.inside(i, blocked=reason))
    return _mixed(flow, eqn, operands, scope)


def _view(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    values = []
    # `root` stays: it is what products that share an operand are known by.
    for i, x in enumerate(operands[: len(eqn.outvars)]):
        number = flow.number(*signature(eqn), i, x.number)
        values.append(dataclasses.replace(x, number=number))
    return values


def _broadcast(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    # New dimensions of size one only: a view.
    if aval_of(eqn.invars[0]).size == aval_of(eqn.outvars[0]).size:
        return _view(flow, eqn, operands, scope)
    return [*map(spread, elementwise(flow, eqn, operands, scope))]


def _random(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    # Noise on a weight leaves it the weight.
    return [*map(spread, elementwise(flow, eqn, operands, scope))]


def _slice(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    # No arithmetic: taken in the backward pass, a slice of a weight is no cotangent.
    flow.readers.gathered(eqn, operands)
    value = picked(joined(operands), operands[0], operands[1:])
    return _numbered(flow, eqn, operands, value)


def _dot_general(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    _record(flow, eqn, operands, scope, dimension_numbers=dimension_numbers(eqn))
    flow.readers.multiplied(eqn, operands)
    return _product(flow, eqn, operands, scope)


def _ragged_dot(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    lhs, rhs = (aval_of(v) for v in eqn.invars[:2])
    ragged = ragged_of(eqn)
    # Each of m rows meets one group's matrix; the group dimension leads.
    flops = 2 * lhs.size * rhs.shape[-1] if ragged is None else None
    _record(flow, eqn, operands, scope, flops=flops, ragged=ragged)
    return _product(flow, eqn, operands, scope)


def _convolution(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    channels = max(output_channels(eqn), 1)
    per_output = aval_of(eqn.invars[1]).size // channels
    size = aval_of(eqn.outvars[0]).size
    sizes = size // channels, channels, per_output
    _record(flow, eqn, operands, scope, flops=2 * size * per_output, sizes=sizes)
    return _product(flow, eqn, operands, scope)


def _construct(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> Sequence[Value]:
    """The rule of constructs, by the table."""
    if ops.mark_of(eqn) is not None:
        return _marked(flow, eqn, operands, scope)
    construct = Construct.of(eqn)
    if construct is None:
        return opaque(flow, eqn, operands, scope)
    if construct.chooses:
        return _branches(flow, construct, operands, scope)
    if construct.iterates:
        return loop_rule(flow, construct, operands, scope)
    # Its gradients are computed by what no equation here shows yet.
    if construct.rule == "derivative":
        flow.hand_written[scope.position] = HandWritten(eqn, tuple(operands), scope)
    inside = scope.inside(blocked=_LEFT.get(construct.rule or ""))
    if construct.mesh is not None:
        sizes, manual = dict(construct.mesh.shape), construct.manual_axes or ()
        shards = math.prod(sizes[axis] for axis in manual)
        inside = scope.inside(times=shards, in_shard_map=len(manual) == len(sizes))
    return flow.walk(construct.bodies[0], operands, inside, scope.read)


def _marked(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> Sequence[Value]:
    """One of our own functions: never rewritten, or it would be quantized twice."""
    fp8 = [
        i for i, v in enumerate(eqn.invars) if aval_of(v).dtype in numerics.FP8_DTYPES
    ]
    # Two operands of codes: a product, which the report counts. Calls that hold one are
    # walked for it.
    if len(fp8) == 2:
        blocked = _blocked_side([(eqn.invars[i], eqn.invars[i + 1]) for i in fp8])
        ragged = of_marked(
            [aval_of(eqn.invars[i]) for i in fp8], aval_of(eqn.outvars[0])
        )
        known = {"primitive": MARKED, "blocked": blocked, "ragged": ragged}
        _record(flow, eqn, operands, scope, pair=fp8, **known)
        return _product(flow, eqn, operands, scope)
    jaxprs = jaxprs_of(eqn)
    if len(jaxprs) != 1 or len(eqn.invars) == 1:
        return _mixed(flow, eqn, operands, scope)
    return flow.walk(jaxprs[0], operands, scope.inside(blocked=OURS))


def _blocked_side(pairs: Sequence[tuple[Any, Any]]) -> Side | None:
    """Which of two pairs of codes and scales has fewer scale rows than rows."""
    for side, (data, scale) in zip(SIDES, pairs, strict=True):
        rows, scales = aval_of(data).shape[:-1], aval_of(scale).shape[:-1]
        if len(rows) == len(scales) > 0 and scales[-1] < rows[-1]:
            return side
    return None


def _branches(
    flow: Flow, construct: Construct, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    index, inputs = operands[0], operands[1:]
    branches = [
        flow.walk(
            jaxpr,
            [_in_branch(flow, index, i, x) for x in inputs],
            scope.inside(i),
            scope.read,
        )
        for i, jaxpr in enumerate(construct.bodies)
    ]
    return [_chosen(flow, index, values) for values in zip(*branches, strict=True)]


def _chosen(flow: Flow, index: Value, values: Sequence[Value]) -> Value:
    # A branch that lacks a residual returns zeros for it: no value of its own.
    informed = {v for v in values if v.leaves} or set(values)
    if len(informed) == 1:
        return informed.pop()
    ordered = sorted(informed, key=lambda v: v.number)
    # One number per choice, so that a backward branch finds its own residual by it.
    number = flow.number("chosen", index.number, *(v.number for v in values))
    flow.chosen[number] = (index.number, tuple(values))
    parts = any(v.parts for v in ordered)
    value = alternative(joined([index, *ordered]), ordered, parts)
    return dataclasses.replace(value, number=number, root=number)


def _in_branch(flow: Flow, index: Value, branch: int, x: Value) -> Value:
    """Narrows a chosen value to the one of this branch.

    JAX may put one branch's residual into the place of another one's: what a backward
    branch reads there is its own.
    """
    chosen_by, values = flow.chosen.get(x.number, (None, ()))
    return values[branch] if chosen_by == index.number else x


def _product(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    # What was near its operands is read through this product: no longer near.
    values = _mixed(flow, eqn, operands, scope)
    near = flow.readers.product(scope.position)
    return [
        dataclasses.replace(value, product=True, near=near, part=0) for value in values
    ]


def _numbered(
    flow: Flow, eqn: JaxprEqn, operands: Sequence[Value], value: Value
) -> list[Value]:
    key = (*signature(eqn), *(v.number for v in operands))
    numbers = [flow.number(i, *key) for i in range(len(eqn.outvars))]
    return [dataclasses.replace(value, number=n, root=n) for n in numbers]


def _record(
    flow: Flow,
    eqn: JaxprEqn,
    operands: Sequence[Value],
    scope: Scope,
    pair: Sequence[int] = (0, 1),
    primitive: str | None = None,
    **known: Any,
) -> None:
    if scope.is_dead and scope.phase == "backward" and primitive != MARKED:
        # A hand-written rule gives gradients of all its inputs, wanted or not.
        return
    left, right = pair
    flow.dots[scope.position] = Dot(
        scope=scope,
        primitive=primitive or primitive_of(eqn),
        lhs=operands[left],
        rhs=operands[right],
        lhs_aval=aval_of(eqn.invars[left]),
        rhs_aval=aval_of(eqn.invars[right]),
        out_aval=aval_of(eqn.outvars[0]),
        **known,
    )


RULES: dict[str, FlowRule] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_SLICES, _slice),
    **dict.fromkeys(CONSTRUCTS, _construct),
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "random_bits": _random,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
}
