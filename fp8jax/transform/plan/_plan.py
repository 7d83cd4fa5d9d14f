"""Which products change, and how; and the report that says so."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from fp8jax import ops
from fp8jax.recipes import GEMM_NAMES, GemmName, GemmSpec, Recipe, Residual
from fp8jax.transform.analysis import (
    MARKED,
    UNCLEAR,
    Assignment,
    Role,
    StoredOperands,
    multiplies_features,
    other_side,
)
from fp8jax.transform.call import Leaf
from fp8jax.transform.ir import Position
from fp8jax.transform.plan._decisions import Decision, LayerDot, QuantizedDot, StoredDot
from fp8jax.transform.plan._doubts import doubts, inputs, would_be_layer
from fp8jax.transform.plan._kernels import Verdict, implementation_of, on_devices
from fp8jax.transform.plan._names import layers_of, names_of, told_apart
from fp8jax.transform.plan._narrow import narrow_notes
from fp8jax.transform.plan._obstacles import (
    another_form,
    in_batch,
    layer_obstacles,
    unsupported,
)
from fp8jax.transform.plan._policy import Policy
from fp8jax.transform.plan._report import WOULD_BE, Report
from fp8jax.transform.plan._rows import first_side, row_of
from fp8jax.transform.plan._rule_call import RuleCall
from fp8jax.transform.plan._splits import Splits
from fp8jax.transform.plan._stored_plan import notes_on, stored_dot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of a function's products.

    Attributes:
        replacements: by position; what is not here stays as it is.
        measured: paths and roles of the products in FP8 that stand in the program
            itself, in order.
        report: tells about all of them.
        whole_step: whether the function holds a backward pass.
        is_weight: for each leaf of the arguments, whether it is a parameter.
        positions: of the products that the report's rows are about; None of those in
            gradient rules, whose positions are their own.
        doubts: what the user is warned of.
    """

    replacements: Mapping[Position, Decision | RuleCall]
    measured: tuple[tuple[str, Role], ...]
    report: Report
    whole_step: bool
    is_weight: tuple[bool, ...]
    positions: tuple[Position | None, ...]
    doubts: tuple[str, ...] = ()


def make_plan(
    assignments: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    whole_step: bool,
    spread: ops.Spread,
    splits: Splits,
    weights: int,
    stored: StoredOperands,
) -> Plan:
    """Decides what becomes of every product.

    Args:
        assignments: the roles.
        leaves: of the arguments, for their paths.
        policy: what the user asked for.
        whole_step: whether the function holds a backward pass.
        spread: over how many devices XLA may split the function's arrays.
        splits: what is known of the mesh.
        weights: `Value.leaves` of the parameters.
        stored: where QTensors are used.
    """
    leaves = told_apart(leaves, assignments)
    obstacles = layer_obstacles(assignments)
    replacements, rows, measured = {}, [], []
    data = inputs(assignments, leaves)
    kernel_of = functools.cache(implementation_of)  # It traces a GEMM each time.
    for a in assignments:
        of_dot = stored.of_dots.get(a.dot.position)
        verdict = Verdict(None)
        if of_dot and a.role != "wgrad":
            verdict = Verdict(*stored_dot(a, of_dot, leaves, policy, unsupported))
        # Codes of other tiles are made anew in a step, whose gradients read them, too.
        if not of_dot or (whole_step and verdict.replacement is None):
            verdict = _decide(a, leaves, policy, obstacles, whole_step, data)
        verdict = on_devices(verdict, a.dot, spread, splits, kernel_of)
        if verdict.replacement is not None:
            replacements[a.dot.position] = verdict.replacement
        rows.append(row := row_of(a, leaves, verdict, kernel_of))
        is_stored = isinstance(verdict.replacement, StoredDot)
        if row.tiles and not is_stored and a.dot.ragged is None:
            measured.append((row.path, row.role))
    matched = {
        policy.rule_for(names_of(a, leaves[layer]), role, *_features(a))
        for a in assignments
        for layer in layers_of(a)
        for role in ((_gemm_name(a.role),) if whole_step else GEMM_NAMES)
    }
    notes = (
        *_notes(policy, assignments, replacements.values()),
        *notes_on(stored, leaves),
    )
    if whole_step:
        pairs = zip(rows, assignments, strict=True)
        notes += narrow_notes([(row, _features(a)) for row, a in pairs if row.tiles])
    unmatched = tuple(rule.pattern for rule in policy.rules if rule not in matched)
    return Plan(
        replacements,
        tuple(measured),
        Report(tuple(rows), unmatched, notes),
        whole_step,
        tuple(bool(weights >> i & 1) for i, _ in enumerate(leaves)),
        tuple(a.dot.position for a in assignments),
    )


def with_doubts(
    plan: Plan,
    assignments: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    told: bool,
) -> Plan:
    """Adds to a whole step's plan what there is to doubt about it.

    Args:
        plan: without.
        assignments: the roles.
        leaves: of the arguments.
        policy: what the user asked for.
        told: whether the user said which leaves are parameters.
    """
    if not plan.whole_step:
        return plan
    in_fp8 = plan.replacements.keys()
    found = doubts(assignments, in_fp8, leaves, policy, unsupported, told)
    return doubting(plan, found)


def doubting(plan: Plan, doubts: tuple[str, ...]) -> Plan:
    """Adds doubts to the plan and to its report."""
    report = dataclasses.replace(plan.report, notes=(*plan.report.notes, *doubts))
    return dataclasses.replace(plan, report=report, doubts=(*plan.doubts, *doubts))


def _notes(
    policy: Policy, assignments: Sequence[Assignment], decisions: Iterable[object]
) -> tuple[str, ...]:
    notes = []
    alone = sum(isinstance(what, QuantizedDot) and what.alone for what in decisions)
    if alone:
        notes.append(
            f"{alone} products of sharded arrays quantize for themselves: shards may "
            "cut their tiles, or types hold their shardings. Their codes are not "
            "shared, and nothing is computed with them (hoist, pair, fuse)."
        )
    if policy.stats and any(a.dot.scope.in_condition for a in assignments):
        notes.append("Products in a loop's condition are not measured (stats=).")
    if policy.stats and any(a.dot.ragged for a in assignments):
        notes.append("Products of rows in groups are not measured (stats=).")
    return tuple(notes)


def _features(a: Assignment) -> tuple[int, int]:
    """Input and output features of a product's layer."""
    assert a.side is not None
    free = a.dot.free(a.side)
    if a.role == "wgrad":
        return free, a.dot.free(other_side(a.side))
    return (free, a.dot.contraction) if a.role == "dgrad" else (a.dot.contraction, free)


def _gemm_name(role: Role) -> GemmName:
    names: dict[Role, GemmName] = {"dgrad": "dgrad", "wgrad": "wgrad"}
    return names.get(role, "fprop")


def _decide(
    a: Assignment,
    leaves: Sequence[Leaf],
    policy: Policy,
    obstacles: Mapping[int, str],
    whole_step: bool,
    data: Collection[int],
) -> Verdict:
    dot = a.dot
    if dot.primitive == MARKED:
        return Verdict(None, "by fp8jax itself")
    if a.role == "other" or a.weight is None:
        if dot.is_product and not dot.scope.blocked:
            return Verdict(None, _why_other(a, leaves, policy, data))
        return Verdict(None, unsupported(dot))
    reason = unsupported(dot) or another_form(a) or in_batch(a)
    if reason:
        return Verdict(None, reason)
    choices: set[tuple[GemmSpec | None, str]] = set()
    for layer in layers_of(a):
        obstacle = obstacles.get(layer, "it has no forward product here")
        if obstacle:
            choices.add((None, f"as its layer: {obstacle}"))
            continue
        gemm = policy.gemm(
            names_of(a, leaves[layer]), _gemm_name(a.role), *_features(a)
        )
        choices.add(gemm)
    if len(choices) > 1:
        return Verdict(None, UNCLEAR)
    gemm, reason = choices.pop()
    layer = names_of(a, leaves[a.weight]), *_features(a)
    if not whole_step:
        return _layer(a, policy.layer(*layer), reason, policy)
    return _quantized(a, gemm, reason, policy, policy.residual(*layer))


def _why_other(
    a: Assignment, leaves: Sequence[Leaf], policy: Policy, data: Collection[int]
) -> str:
    suspects = [
        i
        for i in a.suspects
        if i not in data and leaves[i].is_float and multiplies_features(a.dot, i)
    ]
    # Of two arrays, one in a container is a parameter rather than one that is alone.
    suspects = [i for i in suspects if leaves[i].keys] or suspects
    if len(suspects) != 1:
        return a.reason
    leaf = leaves[suspects[0]]
    if not would_be_layer(a, suspects[0], leaves, policy):
        return a.reason
    if unsupported(a.dot) or a.dot.has_batch:
        return a.reason
    return f"{WOULD_BE}{leaf.full_path} were a parameter: name it in weights="


def _layer(a: Assignment, recipe: Recipe, reason: str, policy: Policy) -> Verdict:
    """A forward product to be differentiated outside; `reason` is about its fprop."""
    assert a.side is not None
    if recipe.is_off:
        return Verdict(None, reason)
    if recipe.fprop is None:
        reason += "; its gradients are in FP8"
    return Verdict(LayerDot(recipe, a.side, policy.implementation), reason)


def _quantized(
    a: Assignment,
    gemm: GemmSpec | None,
    reason: str,
    policy: Policy,
    residual: Residual,
) -> Verdict:
    if gemm is None:
        return Verdict(None, reason)
    # The named side is the weight, second in its recipe, but wgrad's activation, first.
    named, other = (gemm.lhs, gemm.rhs) if a.role == "wgrad" else (gemm.rhs, gemm.lhs)
    specs = (named, other) if a.side == "lhs" else (other, named)
    early = residual == "fp8" and a.role == "wgrad" and a.dot.ragged is None
    dot = QuantizedDot(
        a.role, *specs, policy.implementation, first_side(a), early=early
    )
    return Verdict(dot)
