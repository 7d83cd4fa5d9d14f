"""How values flow through each construct: one rule each."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from fp8jax import _compat, numerics, ops
from fp8jax.transform._interpreter import Flow, FlowRule, sub_jaxprs
from fp8jax.transform._values import (
    HAND_WRITTEN_CALLS,
    MARKED,
    SIDES,
    Dot,
    HandWritten,
    Scope,
    Side,
    Value,
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
_SLICES = ("dynamic_slice", "gather", "slice", "split")
# Call their one jaxpr with the equation's operands.
_CALLS = (
    "checkpoint",
    "closed_call",
    "core_call",
    "core_closed_call",
    "eval_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
)


def elementwise(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """What is known of any primitive: results depend on all operands."""
    value = _joined(operands)
    if scope.phase == "backward":
        value = dataclasses.replace(value, cotangent=True)
    if any(hasattr(v.aval, "inner_aval") for v in eqn.invars):
        # What is read from a mutable array may come from anywhere.
        value = dataclasses.replace(value, leaves=value.leaves | flow.closure)
    return _numbered(flow, eqn, operands, value)


def opaque(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    """A primitive we do not enter: products in its jaxprs are only reported."""
    number = flow.number("unknown", scope.position)
    unknown = dataclasses.replace(_joined(operands), number=number, root=number)
    reason = f"inside {eqn.primitive.name}: not handled, left as it is"
    for i, jaxpr in enumerate(sub_jaxprs(eqn)):
        inputs = [unknown] * len(_compat.open_jaxpr(jaxpr).invars)
        flow.walk(jaxpr, inputs, scope.inside(i, blocked=reason))
    return elementwise(flow, eqn, operands, scope)


def _shard_map(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    sizes = dict(eqn.params["mesh"].shape)
    manual = _compat.manual_axes(eqn.params)
    shards = math.prod(sizes[axis] for axis in manual)
    inside = scope.inside(times=shards, in_shard_map=len(manual) == len(sizes))
    return flow.walk(eqn.params["jaxpr"], operands, inside)


def _view(flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope) -> list[Value]:
    values = []
    for i, x in enumerate(operands[: len(eqn.outvars)]):
        number = flow.number(*_signature(eqn), i, x.number)
        values.append(dataclasses.replace(x, number=number))
    return values


def _broadcast(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    if eqn.invars[0].aval.size == eqn.outvars[0].aval.size:
        return _view(flow, eqn, operands, scope)
    return elementwise(flow, eqn, operands, scope)


def _slice(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    return _numbered(flow, eqn, operands, _joined(operands))


def _dot_general(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    dimension_numbers = eqn.params["dimension_numbers"]
    _record(flow, eqn, operands, scope, dimension_numbers=dimension_numbers)
    return _product(flow, eqn, operands, scope)


def _ragged_dot(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    # Each of m rows meets one group's matrix; the group dimension leads.
    _record(flow, eqn, operands, scope, flops=2 * lhs.size * rhs.shape[-1])
    return _product(flow, eqn, operands, scope)


def _convolution(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    kernel = eqn.invars[1].aval
    channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    per_output = kernel.size // max(channels, 1)
    flops = 2 * eqn.outvars[0].aval.size * per_output
    _record(flow, eqn, operands, scope, flops=flops)
    return _product(flow, eqn, operands, scope)


def _call(
    flow: Flow,
    eqn: Any,
    operands: Sequence[Value],
    scope: Scope,
    blocked: str | None = None,
) -> Sequence[Value]:
    if str(eqn.params.get("name", "")).startswith(ops.MARK):
        return _marked(flow, eqn, operands, scope)
    jaxprs = sub_jaxprs(eqn)
    if len(jaxprs) != 1:
        return opaque(flow, eqn, operands, scope)
    invars = _compat.open_jaxpr(jaxprs[0]).invars
    if len(invars) != len(operands):
        return opaque(flow, eqn, operands, scope)
    return flow.walk(jaxprs[0], operands, scope.inside(blocked=blocked))


def _hand_written(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> Sequence[Value]:
    """The function without its rule, which nothing here knows."""
    flow.hand_written[scope.position] = HandWritten(eqn, tuple(operands), scope)
    return _call(flow, eqn, operands, scope, blocked=HAND_WRITTEN)


def _marked(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> Sequence[Value]:
    """One of our own functions: never rewritten, or it would be quantized twice."""
    fp8 = [i for i, v in enumerate(eqn.invars) if v.aval.dtype in numerics.FP8_DTYPES]
    if len(fp8) == 2:
        blocked = _blocked_side([(eqn.invars[i], eqn.invars[i + 1]) for i in fp8])
        known = {"primitive": MARKED, "blocked": blocked}
        _record(flow, eqn, operands, scope, pair=fp8, **known)
        return _product(flow, eqn, operands, scope)
    jaxprs = sub_jaxprs(eqn)
    if len(jaxprs) != 1 or len(eqn.invars) == 1:
        return elementwise(flow, eqn, operands, scope)
    return flow.walk(jaxprs[0], operands, scope.inside(blocked=OURS))


def _blocked_side(pairs: Sequence[tuple[Any, Any]]) -> Side | None:
    """Of two pairs of codes and scales, the one with fewer scale rows than rows."""
    for side, (data, scale) in zip(SIDES, pairs, strict=True):
        if scale.aval.ndim == 2 and scale.aval.shape[0] < data.aval.shape[0]:
            return side
    return None


def _scan(flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope) -> list[Value]:
    n_consts, n_carry = _compat.scan_counts(eqn.params)
    length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
    consts = list(operands[:n_consts])
    init = list(operands[n_consts : n_consts + n_carry])
    stacked = operands[n_consts + n_carry :]
    # Iterations are not told apart: a loop's own operands number its carries, so that
    # a recomputed loop has the numbers of the original.
    loop = (length, frozenset(x.number for x in stacked))
    steps = [_unstacked(flow, x) for x in stacked]

    def body(carry: list[Value]) -> list[Value]:
        return flow.walk(jaxpr, [*consts, *carry, *steps], scope.inside(times=length))

    fixed = _fixed_carries(jaxpr, n_consts, n_carry)
    carry, results = _fixpoint(flow, body, init, fixed, ("carry", *loop))
    return [
        *_after_loop(flow, carry, fixed),
        *(_stacked(flow, y) for y in results[n_carry:]),
    ]


def _while(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts = list(operands[:n_cond])
    consts = list(operands[n_cond : n_cond + n_body])
    init = list(operands[n_cond + n_body :])
    jaxprs = sub_jaxprs(eqn)  # The body comes first in the alphabet.
    body_jaxpr, cond_jaxpr = jaxprs

    def body(carry: list[Value]) -> list[Value]:
        inside = scope.inside(1, in_condition=True)
        flow.walk(cond_jaxpr, [*cond_consts, *carry], inside)
        return flow.walk(body_jaxpr, [*consts, *carry], scope.inside(0))

    fixed = _fixed_carries(body_jaxpr, n_body, len(init))
    loop = ("while", frozenset(x.number for x in consts))
    carry, _ = _fixpoint(flow, body, init, fixed, loop)
    return _after_loop(flow, carry, fixed)


def _cond(flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope) -> list[Value]:
    index, inputs = operands[0], operands[1:]
    branches = [
        flow.walk(jaxpr, inputs, scope.inside(i))
        for i, jaxpr in enumerate(sub_jaxprs(eqn))
    ]
    return [_chosen(flow, index, values) for values in zip(*branches, strict=True)]


def _chosen(flow: Flow, index: Value, values: Sequence[Value]) -> Value:
    # A branch that lacks a residual returns zeros for it: no value of its own.
    informed = {v for v in values if v.leaves} or set(values)
    if len(informed) == 1:
        return informed.pop()
    ordered = sorted(informed, key=lambda v: v.number)
    number = flow.number("cond", *(v.number for v in ordered))
    return dataclasses.replace(_joined([index, *ordered]), number=number, root=number)


def _fixed_carries(jaxpr: Any, n_consts: int, n_carry: int) -> list[bool]:
    """Which carries a loop's body returns as they came."""
    inner = _compat.open_jaxpr(jaxpr)
    carried = inner.invars[n_consts : n_consts + n_carry]
    returned = inner.outvars[:n_carry]
    return [a is b for a, b in zip(carried, returned, strict=True)]


def _fixpoint(
    flow: Flow,
    body: Callable[[list[Value]], list[Value]],
    init: list[Value],
    fixed: list[bool],
    loop: tuple[Hashable, ...],
) -> tuple[list[Value], list[Value]]:
    """Carries that no further iteration changes, and that iteration's results."""
    carry = []
    for i, (x, is_fixed) in enumerate(zip(init, fixed, strict=True)):
        number = x.number if is_fixed else flow.number(*loop, i, x.number)
        root = x.root if is_fixed else number
        carry.append(dataclasses.replace(x, number=number, root=root))
    while True:  # Ends: knowledge only grows, and there is finitely much of it.
        results = body(carry)
        grown = [
            dataclasses.replace(_joined([c, r]), number=c.number, root=c.root)
            for c, r in zip(carry, results, strict=False)
        ]
        if grown == carry:
            return carry, results
        carry = grown


def _after_loop(flow: Flow, carry: list[Value], fixed: list[bool]) -> list[Value]:
    values = []
    for x, is_fixed in zip(carry, fixed, strict=True):
        number = x.number if is_fixed else flow.number("last", x.number)
        root = x.root if is_fixed else number
        values.append(dataclasses.replace(x, number=number, root=root))
    return values


def _stacked(flow: Flow, x: Value) -> Value:
    return _renumbered(x, functools.partial(_inverse, flow, "stack", "slice"))


def _unstacked(flow: Flow, x: Value) -> Value:
    return _renumbered(x, functools.partial(_inverse, flow, "slice", "stack"))


def _inverse(flow: Flow, name: str, inverse: str, number: int) -> int:
    key = flow.key(number)
    return key[1] if key[0] == inverse else flow.number(name, number)


def _renumbered(x: Value, f: Callable[[int], int]) -> Value:
    return dataclasses.replace(x, number=f(x.number), root=f(x.root))


def _joined(values: Sequence[Value]) -> Value:
    """Depends on all of them; is none of them."""
    return Value(
        leaves=functools.reduce(operator.or_, (v.leaves for v in values), 0),
        number=-1,
        root=-1,
        product=any(v.product for v in values),
        cotangent=any(v.cotangent for v in values),
    )


def _product(
    flow: Flow, eqn: Any, operands: Sequence[Value], scope: Scope
) -> list[Value]:
    values = elementwise(flow, eqn, operands, scope)
    return [dataclasses.replace(value, product=True) for value in values]


def _numbered(
    flow: Flow, eqn: Any, operands: Sequence[Value], value: Value
) -> list[Value]:
    key = (*_signature(eqn), *(v.number for v in operands))
    numbers = [flow.number(i, *key) for i in range(len(eqn.outvars))]
    return [dataclasses.replace(value, number=n, root=n) for n in numbers]


def _signature(eqn: Any) -> tuple[Hashable, ...]:
    return (eqn.primitive.name, *map(_hashable, sorted(eqn.params.items())))


def _hashable(item: tuple[str, Any]) -> Hashable:
    try:
        hash(item)
    except TypeError:
        return item[0], id(item[1])
    return item


def _record(
    flow: Flow,
    eqn: Any,
    operands: Sequence[Value],
    scope: Scope,
    pair: Sequence[int] = (0, 1),
    primitive: str | None = None,
    **known: Any,
) -> None:
    left, right = pair
    flow.dots[scope.position] = Dot(
        scope=scope,
        primitive=primitive or eqn.primitive.name,
        lhs=operands[left],
        rhs=operands[right],
        lhs_aval=eqn.invars[left].aval,
        rhs_aval=eqn.invars[right].aval,
        out_aval=eqn.outvars[0].aval,
        **known,
    )


RULES: dict[str, FlowRule] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_SLICES, _slice),
    **dict.fromkeys(_CALLS, _call),
    **dict.fromkeys(HAND_WRITTEN_CALLS, _hand_written),
    "broadcast_in_dim": _broadcast,
    "cond": _cond,
    "conv_general_dilated": _convolution,
    "custom_lin": functools.partial(_call, blocked=HAND_WRITTEN),
    "custom_partitioning": functools.partial(_call, blocked=OWN_PARTITIONING),
    "custom_vmap_call": functools.partial(_call, blocked=OWN_VMAP),
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
