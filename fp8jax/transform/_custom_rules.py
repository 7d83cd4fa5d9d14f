"""`custom_rules=`: functions with a gradient rule of their own, rewritten with it.

In a forward function such a function is one call with a rule attached. The two halves
of the rule are a small train step: what is what in them, and what becomes of it, is
decided as in a whole step. The call is then one of the rewritten function with the
rewritten rule: all that the user's rule does to a gradient, it still does.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform._pipeline import lowered, prepared
from fp8jax.transform.analysis import (
    JVP,
    RULES,
    TRANSPOSE,
    Dot,
    Flow,
    HandWritten,
    Pass,
    Phase,
    Role,
    Value,
    opaque,
)
from fp8jax.transform.ir import (
    Position,
    asks_what_is_differentiated,
    closes_over_arrays,
)
from fp8jax.transform.lower import Program
from fp8jax.transform.plan import Plan, Policy, Row, RuleCall

LEFT = "hand-written VJP, named in custom_rules but left as it is: "

# Their order is that of rows in the report, which tells of the rule alone: the function
# itself runs where nothing is differentiated, and the rule's first half does the same.
_PARTS = ("forward", "backward", "primal")
_PRIMAL = _PARTS.index("primal")

# `(dots, whole_step, programs)` to the plan for the products of those programs.
Decide = Callable[[Sequence[Dot], bool, Sequence[Any]], Plan]


def check_custom_rules(custom_rules: str | Sequence[str]) -> tuple[str, ...]:
    """`custom_rules` as patterns.

    Raises:
        ValueError: If it is none.
    """
    one = isinstance(custom_rules, str)
    known = one or isinstance(custom_rules, Sequence)
    patterns = (custom_rules,) if one else tuple(custom_rules) if known else ()
    if not known or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            "fp8_transform takes custom_rules=[name, ...], names of functions with a "
            f"custom_vjp or custom_jvp, got {custom_rules!r}."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                "fp8_transform takes custom_rules of regular expressions, got "
                f"{pattern!r}: {error}."
            ) from error
    return patterns


def with_custom_rules(plan: Plan, flow: Flow, policy: Policy, decide: Decide) -> Plan:
    """The plan for a forward function, with that for the functions named.

    Args:
        plan: which leaves them as they are.
        flow: of the function.
        policy: with the names.
        decide: what to do with the products of a program.
    """
    matched: set[str] = set()
    replacements = dict(plan.replacements)
    rows = dict(zip(sorted(flow.dots), plan.report.rows, strict=True))
    measured = _measured(sorted(flow.dots), plan.report.rows)
    of_rules: set[Position] = set()
    unmatched_rules = plan.report.unmatched_rules
    rewritten: dict[Any, RuleCall] = {}
    traced: dict[int, RuleCall | str] = {}
    for position, site in flow.hand_written.items():
        name = _compat.function_name(site.eqn)
        names = {p for p in policy.custom_rules if re.fullmatch(p, name)}
        matched |= names
        if not names or site.scope.blocked:
            continue
        inside = [p for p in rows if p[: len(position)] == position]
        if id(site.eqn) not in traced:
            traced[id(site.eqn)] = _traced(site.eqn, policy.without)
        call = traced[id(site.eqn)]
        if isinstance(call, str):
            for p in inside:
                rows[p] = dataclasses.replace(rows[p], reason=call)
            continue
        positions, part = _planned(call, site, flow, decide)
        for p in inside:
            del rows[p]
        for p, row in zip(positions, part.report.rows, strict=True):
            if p[0] != _PRIMAL:
                rows[*position, *p] = row
                of_rules.add((*position, *p))
        unmatched_rules = tuple(
            r for r in unmatched_rules if r in part.report.unmatched_rules
        )
        if part.replacements:
            names = _measured(positions, part.report.rows) if policy.stats else {}
            # Equal calls are one object, so that layers share one jaxpr.
            ordered = tuple(sorted(part.replacements.items(), key=_position))
            key = id(site.eqn), ordered, tuple(sorted(names.items()))
            if key not in rewritten:
                rewritten[key] = _rewritten(
                    call, part.replacements, names, policy.without
                )
            replacements[position] = rewritten[key]
            measured[position] = rewritten[key].measured
    report = dataclasses.replace(
        plan.report,
        rows=tuple(rows[p] for p in sorted(rows)),
        unmatched_rules=unmatched_rules,
        unmatched_custom_rules=tuple(
            p for p in policy.custom_rules if p not in matched
        ),
    )
    names = tuple(name for p in sorted(measured) for name in measured[p])
    return dataclasses.replace(
        plan,
        replacements=replacements,
        measured=names,
        positions=tuple(None if p in of_rules else p for p in sorted(rows)),
        report=report,
    )


def _measured(
    positions: Sequence[Position], rows: Sequence[Row]
) -> dict[Position, tuple[tuple[str, Role], ...]]:
    """Path and role of what is measured at each position that has a product in FP8."""
    pairs = zip(positions, rows, strict=True)
    return {p: ((row.path, row.role),) for p, row in pairs if row.tiles}


def _traced(eqn: JaxprEqn, without: Collection[str]) -> RuleCall | str:
    """The function with its rule, or why it stays as it is."""
    if asks_what_is_differentiated(eqn):
        return f"{LEFT}its rule asks what is differentiated (symbolic_zeros)"
    if closes_over_arrays(eqn):  # JAX refuses their derivatives; so must we.
        return f"{LEFT}it closes over arrays: make them arguments"
    if eqn.effects:
        return f"{LEFT}it has side effects"
    if _compat.TracingContext.of(eqn).mesh is not None:
        return f"{LEFT}in a shard_map, or of explicit sharding"
    try:
        call = RuleCall.of(eqn)
    # The rule is the user's, who may never differentiate: what it raises is no error.
    except Exception as error:
        text = str(error).partition("\n")[0]
        return f"{LEFT}its rule cannot be traced: {type(error).__name__}: {text}"
    programs = {name: Program(getattr(call, name), is_rule=True) for name in _PARTS}
    parts = {name: prepared(part, without).jaxpr for name, part in programs.items()}
    return dataclasses.replace(call, **parts)


def _planned(
    call: RuleCall, site: HandWritten, outer: Flow, decide: Decide
) -> tuple[list[Position], Plan]:
    """Positions of the function's products, each after its part's index; their plan."""
    flow = Flow(RULES, opaque, outer.closure)

    def renumbered(x: Value) -> Value:
        number, root = (flow.number("operand", n) for n in (x.number, x.root))
        return dataclasses.replace(x, number=number, root=root)

    def walk(part: str, phase: Phase, inputs: Sequence[Value]) -> list[Value]:
        # As JAX would name them in a step that differentiates the call.
        forward = phase == "forward"
        stack = f"jvp({call.name})" if forward else f"transpose(jvp({call.name}))"
        names = (JVP,) if forward else (TRANSPOSE, JVP)
        scope = dataclasses.replace(
            site.scope,
            position=(_PARTS.index(part),),
            stack="/".join(filter(None, (site.scope.stack, stack))),
            within=Pass(phase, names + site.scope.within.names),
        )
        return flow.walk(getattr(call, part), inputs, scope)

    operands = [renumbered(x) for x in site.operands]
    walk("primal", "forward", operands)
    residuals = walk("forward", "forward", operands)[len(call.gives) :]
    cotangents = []
    for i in range(sum(call.gives)):
        number = flow.number("cotangent", i)
        cotangents.append(Value(flow.closure, number, number, True, True))
    walk("backward", "backward", [*residuals, *cotangents])
    positions = sorted(flow.dots)
    dots = [flow.dots[p] for p in positions]
    return positions, decide(dots, True, (call.forward, call.backward))


def _rewritten(
    call: RuleCall,
    replacements: Mapping[Position, Any],
    names: Mapping[Position, tuple[tuple[str, Role], ...]],
    without: Collection[str],
) -> RuleCall:
    """The call with replacements, measured where `names` tells of any products."""
    parts, moments = {}, {}
    for i, part in enumerate(_PARTS):
        measured = [x for p in sorted(names) if p[0] == i for x in names[p]]
        own = {p[1:]: what for p, what in replacements.items() if p[0] == i}
        jaxpr = getattr(call, part)
        program = Program(
            jaxpr,
            is_weight=(False,) * len(_compat.open_jaxpr(jaxpr).invars),
            replacements=own,
            # As of any forward function, what is measured is fprop alone.
            measures=bool(measured) and part != "backward",
            is_rule=True,
        )
        made = lowered(program, without)
        parts[part] = made.jaxpr
        if part != "backward":
            moments[part] = tuple(zip(measured, made.collected, strict=True))
    return dataclasses.replace(call, **parts, moments=moments)


def _position(item: tuple[Position, Any]) -> Position:
    return item[0]
