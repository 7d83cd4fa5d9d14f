"""Which products change, and how; and the report that says so."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax import _compat, ops
from fp8jax.quant import QuantSpec
from fp8jax.recipes import GEMM_NAMES, GemmName, GemmSpec, Recipe, Residual
from fp8jax.transform._doubts import doubts, inputs
from fp8jax.transform._frozen import multiplies_features
from fp8jax.transform._leaves import Leaf
from fp8jax.transform._names import names_of
from fp8jax.transform._policy import Policy
from fp8jax.transform._report import Report, Row, describe_tiles
from fp8jax.transform._roles import UNCLEAR, Assignment, Role
from fp8jax.transform._rule_call import RuleCall
from fp8jax.transform._stored import StaticDot, StoredOperands
from fp8jax.transform._stored_plan import notes_on, static_dot
from fp8jax.transform._values import MARKED, Dot, Position, Side, other_side

SPLIT = "sharded over devices, and XLA has no rule to split its GPU kernel by"


@dataclasses.dataclass(frozen=True)
class QuantizedDot:
    """One product in FP8, in a function that holds its own backward pass."""

    role: Role
    lhs_spec: QuantSpec
    rhs_spec: QuantSpec
    implementation: str | None
    first: Side  # The operand that the recipe counts first.
    split: bool = False  # Whether XLA may split it over devices.
    early: bool = False  # Whether wgrad's codes of x are made in the forward pass.


@dataclasses.dataclass(frozen=True)
class LayerDot:
    """A forward product whose gradients shall follow the recipe, too."""

    recipe: Recipe
    weight: Side
    implementation: str | None
    split: bool = False  # Whether XLA may split it over devices.

    @property
    def first(self) -> Side:
        """The operand that the recipe counts first."""
        return other_side(self.weight)


Replacement = QuantizedDot | LayerDot


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
        doubts: what the user is warned of.
    """

    replacements: Mapping[Position, Replacement | StaticDot | RuleCall]
    measured: tuple[tuple[str, Role], ...]
    report: Report
    whole_step: bool
    is_weight: tuple[bool, ...]
    doubts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Verdict:
    replacement: Replacement | StaticDot | None
    reason: str = ""


def make_plan(
    assignments: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    whole_step: bool,
    spread: ops.Spread,
    weights: int,
    stored: StoredOperands,
) -> Plan:
    """Decides on every product.

    Args:
        assignments: the roles.
        leaves: of the arguments, for their paths.
        policy: what the user asked for.
        whole_step: whether the function holds a backward pass.
        spread: over how many devices XLA may split the function's arrays.
        weights: `Value.leaves` of the parameters.
        stored: where QTensors are used.
    """
    leaves = _told_apart(leaves, assignments)
    obstacles = _layer_obstacles(assignments)
    replacements, rows, measured = {}, [], []
    data = inputs(assignments, leaves)
    kernel_of = functools.cache(_implementation)  # It traces a GEMM each time.
    for a in assignments:
        of_dot = stored.of_dots.get(a.dot.position)
        verdict = _Verdict(None)
        if of_dot and a.role != "wgrad":
            verdict = _Verdict(*static_dot(a, of_dot, leaves, policy, unsupported))
        # Codes of other tiles are made anew in a step, whose gradients read them, too.
        if not of_dot or (whole_step and verdict.replacement is None):
            verdict = _decide(a, leaves, policy, obstacles, whole_step, data)
        verdict = _on_devices(verdict, a.dot, spread, kernel_of)
        if verdict.replacement is not None:
            replacements[a.dot.position] = verdict.replacement
        rows.append(row := _row(a, leaves, verdict, kernel_of))
        is_static = isinstance(verdict.replacement, StaticDot)
        if row.tiles and not is_static and a.dot.ragged is None:
            measured.append((row.path, row.role))
    matched = {
        policy.rule_for(names_of(a, leaves[layer]), role, *_features(a))
        for a in assignments
        for layer in _layers(a)
        for role in ((_gemm_name(a.role),) if whole_step else GEMM_NAMES)
    }
    notes = (*_notes(policy, assignments), *notes_on(stored, leaves))
    unmatched = tuple(rule.pattern for rule in policy.rules if rule not in matched)
    return Plan(
        replacements,
        tuple(measured),
        Report(tuple(rows), unmatched, notes),
        whole_step,
        tuple(bool(weights >> i & 1) for i, _ in enumerate(leaves)),
    )


def with_doubts(
    plan: Plan,
    assignments: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    told: bool,
) -> Plan:
    """The plan of a whole step, and its report, with what to doubt about them.

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
    """The plan, and its report, with more to warn of."""
    report = dataclasses.replace(plan.report, notes=(*plan.report.notes, *doubts))
    return dataclasses.replace(plan, report=report, doubts=(*plan.doubts, *doubts))


def _on_devices(
    verdict: _Verdict, dot: Dot, spread: ops.Spread, kernel_of: Callable[..., str]
) -> _Verdict:
    """The verdict for arrays so spread: what XLA splits by rule, and what it cannot.

    Rows in groups have no such rule: XLA's own kernels run there.
    """
    what, reason = verdict.replacement, verdict.reason
    if what is None:
        return verdict
    if dot.scope.in_shard_map:
        return verdict
    if dot.ragged is None:
        if spread or _compat.is_explicit(dot.out_aval):
            what = dataclasses.replace(what, split=True)
    elif spread and what.implementation is None:
        if _kernel(what, dot, kernel_of) not in ("", "xla"):
            reason = "; ".join(filter(None, (reason, SPLIT)))
        what = dataclasses.replace(what, implementation="xla")
    return _Verdict(what, reason)


def _notes(policy: Policy, assignments: Sequence[Assignment]) -> tuple[str, ...]:
    notes = []
    if policy.stats and any(a.dot.scope.in_condition for a in assignments):
        notes.append("Products in a loop's condition are not measured (stats=).")
    if policy.stats and any(a.dot.ragged for a in assignments):
        notes.append("Products of rows in groups are not measured (stats=).")
    return tuple(notes)


def _layer_obstacles(assignments: Sequence[Assignment]) -> dict[int, str]:
    """By weight, why its forward products cannot be in FP8, or `""`.

    A gradient is in FP8 only if its layer's forward product can be.
    """
    obstacles: dict[int, str] = {}
    for a in assignments:
        if a.weight is None or a.role not in ("fprop", "recompute"):
            continue
        # A weight used twice is in reach if one of its products is.
        for layer in _layers(a):
            if obstacles.get(layer, "unknown"):
                obstacles[layer] = unsupported(a.dot)
    return obstacles


def _features(a: Assignment) -> tuple[int, int]:
    """Input and output features of a product's layer."""
    assert a.side is not None
    free = a.dot.free(a.side)
    if a.role == "wgrad":
        return free, a.dot.free(other_side(a.side))
    return (free, a.dot.contraction) if a.role == "dgrad" else (a.dot.contraction, free)


def _layers(a: Assignment) -> tuple[int, ...]:
    if a.weight is None or a.side is None or a.dot.primitive == MARKED:
        return ()
    return a.layers or (a.weight,)


def _gemm_name(role: Role) -> GemmName:
    names: dict[Role, GemmName] = {"dgrad": "dgrad", "wgrad": "wgrad"}
    return names.get(role, "fprop")


def unsupported(dot: Dot) -> str:
    """Why no GEMM in FP8 can stand in for this product."""
    if dot.scope.blocked:
        return dot.scope.blocked
    if not dot.is_product:
        return f"{dot.primitive}: no FP8 kernel for it yet"
    for aval in (dot.lhs_aval, dot.rhs_aval, dot.out_aval):
        dtype = aval.dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
            return f"already FP8: {dtype}"
        if dtype not in ops.INPUT_DTYPES:
            return f"dtype {dtype}"
        if not aval.size:
            return "no elements"
    if dot.has_batch:
        return "batch dimensions"
    if _compat.is_explicit(dot.out_aval):
        if dot.ragged is not None:
            return "ragged_dot with explicit sharding"
        sharding = dot.out_aval.sharding
        if set(sharding.mesh.axis_types) != {jax.sharding.AxisType.Explicit}:
            return "explicit sharding on a mesh of several axis types"
        if sharding.spec.unreduced:
            return "explicit sharding with unreduced axes"
    return ""


def _another_form(a: Assignment) -> str:
    """Why a product of rows in groups is none of those that have a kernel, if so."""
    ragged = a.dot.ragged
    if ragged is None:
        return ""
    is_wgrad = a.role == "wgrad"
    if is_wgrad == (ragged.form == "wgrad") and (is_wgrad or a.side == "rhs"):
        return ""
    return f"ragged_dot: a {a.role} whose weight is no matrix for each group"


def _decide(
    a: Assignment,
    leaves: Sequence[Leaf],
    policy: Policy,
    obstacles: Mapping[int, str],
    whole_step: bool,
    data: Collection[int],
) -> _Verdict:
    dot = a.dot
    if dot.primitive == MARKED:
        return _Verdict(None, "by fp8jax itself")
    if a.role == "other" or a.weight is None:
        if dot.is_product and not dot.scope.blocked:
            return _Verdict(None, _why_other(a, leaves, data))
        return _Verdict(None, unsupported(dot))
    reason = unsupported(dot) or _another_form(a)
    if reason:
        return _Verdict(None, reason)
    choices: set[tuple[GemmSpec | None, str]] = set()
    for layer in _layers(a):
        obstacle = obstacles.get(layer, "it has no forward product here")
        if obstacle:
            choices.add((None, f"as its layer: {obstacle}"))
            continue
        gemm = policy.gemm(
            names_of(a, leaves[layer]), _gemm_name(a.role), *_features(a)
        )
        choices.add(gemm)
    if len(choices) > 1:
        return _Verdict(None, UNCLEAR)
    gemm, reason = choices.pop()
    layer = names_of(a, leaves[a.weight]), *_features(a)
    if not whole_step:
        return _layer(a, policy.layer(*layer), reason, policy)
    return _quantized(a, gemm, reason, policy, policy.residual(*layer))


def _why_other(a: Assignment, leaves: Sequence[Leaf], data: Collection[int]) -> str:
    suspects = [
        i
        for i in a.suspects
        if i not in data and leaves[i].is_float and multiplies_features(a.dot, i)
    ]
    # Of two arrays, one in a container is a parameter rather than one that is alone.
    suspects = [i for i in suspects if leaves[i].keys] or suspects
    if len(suspects) != 1:
        return a.reason
    path = leaves[suspects[0]].full_path
    return f"{a.reason}; is {path} one? Then name it in weights="


def _layer(a: Assignment, recipe: Recipe, reason: str, policy: Policy) -> _Verdict:
    """A forward product to be differentiated outside; `reason` is about its fprop."""
    assert a.side is not None
    if recipe.is_off:
        return _Verdict(None, reason)
    if recipe.fprop is None:
        reason += "; its gradients are in FP8"
    return _Verdict(LayerDot(recipe, a.side, policy.implementation), reason)


def _quantized(
    a: Assignment,
    gemm: GemmSpec | None,
    reason: str,
    policy: Policy,
    residual: Residual,
) -> _Verdict:
    if gemm is None:
        return _Verdict(None, reason)
    # The named side is the weight, second in its recipe, but wgrad's activation, first.
    named, other = (gemm.lhs, gemm.rhs) if a.role == "wgrad" else (gemm.rhs, gemm.lhs)
    specs = (named, other) if a.side == "lhs" else (other, named)
    early = residual == "fp8" and a.role == "wgrad" and a.dot.ragged is None
    dot = QuantizedDot(a.role, *specs, policy.implementation, _first(a), early=early)
    return _Verdict(dot)


def _row(
    a: Assignment,
    leaves: Sequence[Leaf],
    verdict: _Verdict,
    kernel_of: Callable[..., str],
) -> Row:
    dot = a.dot
    first = _first(a)
    specs = specs_of(verdict.replacement)
    known = dot.flops is None
    return Row(
        path=_path(a, leaves),
        role=a.role,
        m=dot.free(first) if known else 0,
        n=dot.free(other_side(first)) if known else 0,
        k=dot.contraction if known else 0,
        status="skipped" if not specs and dot.primitive != MARKED else "fp8",
        reason=verdict.reason,
        tiles=describe_tiles(*(spec.tile for spec in specs)),
        kernel=_kernel(verdict.replacement, dot, kernel_of),
        count=dot.scope.times * dot.batch,
        flops=dot.total_flops,
    )


def _first(a: Assignment) -> Side:
    """The first operand as recipes count it: activation, or output gradient."""
    if a.side is None:
        return "lhs"
    return a.side if a.role == "wgrad" else other_side(a.side)


def _path(a: Assignment, leaves: Sequence[Leaf]) -> str:
    if a.weight is None:
        return a.dot.scope.stack
    layers = a.layers or (a.weight,)
    return " | ".join(dict.fromkeys(leaves[layer].shown for layer in layers))


def _told_apart(
    leaves: Sequence[Leaf], assignments: Sequence[Assignment]
) -> Sequence[Leaf]:
    """Leaves by paths that are no other weight's: with the argument's name, if need be.

    A generator's and a critic's weights may have the same one, a policy's and a value
    net's.
    """
    weights = {layer for a in assignments for layer in _layers(a)}
    owners: dict[str, set[str]] = collections.defaultdict(set)
    for i in weights:
        owners[leaves[i].path].add(leaves[i].argument)
    shared = {path for path, arguments in owners.items() if len(arguments) > 1}
    return [
        dataclasses.replace(leaf, shows_argument=i in weights and leaf.path in shared)
        for i, leaf in enumerate(leaves)
    ]


def specs_of(replacement: Replacement | StaticDot | None) -> tuple[QuantSpec, ...]:
    """Of both operands of the product that is in FP8 here, if one is."""
    if isinstance(replacement, StaticDot):
        return replacement.specs
    if isinstance(replacement, QuantizedDot):
        return replacement.lhs_spec, replacement.rhs_spec
    if isinstance(replacement, LayerDot) and replacement.recipe.fprop is not None:
        gemm = replacement.recipe.fprop
        first = replacement.first == "lhs"
        return (gemm.lhs, gemm.rhs) if first else (gemm.rhs, gemm.lhs)
    return ()


def _kernel(
    replacement: Replacement | StaticDot | None, dot: Dot, kernel_of: Callable[..., str]
) -> str:
    specs = specs_of(replacement)
    if replacement is None or not specs:
        return ""
    form = None if dot.ragged is None else dot.ragged.form
    return kernel_of(form, *specs, replacement.implementation)


def _implementation(form: ops.RaggedForm | None, *how: Any) -> str:
    if form is None:
        return ops.gemm_implementation(*how)
    op = "grouped_wgrad" if form == "wgrad" else "grouped_matmul"
    return ops.grouped_implementation(op, *how)
