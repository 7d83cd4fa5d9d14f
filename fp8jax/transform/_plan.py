"""Which products change, and how; and the report that says so."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import ops
from fp8jax.quant import QuantSpec
from fp8jax.recipes import DEFAULT_SKIPS, GemmSpec, Recipe, Rule, first_match
from fp8jax.transform._leaves import Leaf
from fp8jax.transform._report import Report, Row, describe_tiles
from fp8jax.transform._roles import UNCLEAR, Assignment, Role
from fp8jax.transform._values import MARKED, Dot, Position, Side, other_side

_DTYPES = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the user asked for.

    Attributes:
        recipe: of layers that no rule is about.
        rules: the user's, in order; the default skips come after them.
        min_dim: a weight whose input or output features are fewer is skipped.
        implementation: as in `fp8jax.dot_general`.
    """

    recipe: Recipe
    rules: tuple[Rule, ...]
    min_dim: int
    implementation: str | None

    def rule_for(self, path: str) -> Rule | None:
        return first_match((*self.rules, *DEFAULT_SKIPS), path)


@dataclasses.dataclass(frozen=True)
class QuantizedDot:
    """One product in FP8, in a function that holds its own backward pass."""

    role: Role
    lhs_spec: QuantSpec
    rhs_spec: QuantSpec
    implementation: str | None


@dataclasses.dataclass(frozen=True)
class LayerDot:
    """A forward product whose gradients shall follow the recipe, too."""

    recipe: Recipe
    weight: Side
    implementation: str | None


Replacement = QuantizedDot | LayerDot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of a function's products.

    Attributes:
        replacements: by position; what is not here stays as it is.
        report: tells about all of them.
    """

    replacements: Mapping[Position, Replacement]
    report: Report


@dataclasses.dataclass(frozen=True)
class _Verdict:
    replacement: Replacement | None
    reason: str = ""


def make_plan(
    assignments: Sequence[Assignment],
    leaves: Sequence[Leaf],
    policy: Policy,
    whole_step: bool,
) -> Plan:
    """Decides on every product.

    Args:
        assignments: the roles.
        leaves: of the arguments, for their paths.
        policy: what the user asked for.
        whole_step: whether the function holds a backward pass.
    """
    obstacles = _layer_obstacles(assignments, leaves, policy)
    replacements, rows = {}, []
    kernel_of = functools.cache(ops.gemm_implementation)  # It traces a GEMM each time.
    for a in assignments:
        verdict = _decide(a, leaves, policy, obstacles, whole_step)
        if verdict.replacement is not None:
            replacements[a.dot.position] = verdict.replacement
        rows.append(_row(a, leaves, verdict, kernel_of))
    paths = {leaves[a.weight].path for a in assignments if a.weight is not None}
    matched = {policy.rule_for(path) for path in paths}
    unmatched = tuple(rule.pattern for rule in policy.rules if rule not in matched)
    return Plan(
        replacements, Report(tuple(rows), unmatched, _notes(policy, whole_step))
    )


def _notes(policy: Policy, whole_step: bool) -> tuple[str, ...]:
    recipes = [policy.recipe, *(rule.recipe for rule in policy.rules)]
    if whole_step and any(r is not None and r.residual == "fp8" for r in recipes):
        return (
            "residual='fp8' has no effect here: this function holds its own backward "
            "pass, which keeps what it kept. Transform the forward inside grad for it.",
        )
    return ()


def _layer_obstacles(
    assignments: Sequence[Assignment], leaves: Sequence[Leaf], policy: Policy
) -> dict[int, str]:
    """By weight, why its forward products are not in FP8's reach, or `""`.

    A gradient is in FP8 only if its layer's forward product can be.
    """
    obstacles: dict[int, str] = {}
    for a in assignments:
        if a.weight is None or a.role not in ("fprop", "recompute"):
            continue
        # A weight used twice is in reach if one of its products is.
        if obstacles.get(a.weight, "unknown"):
            obstacles[a.weight] = _obstacle(a, leaves, policy)
    return obstacles


def _obstacle(a: Assignment, leaves: Sequence[Leaf], policy: Policy) -> str:
    """Why a product with a weight operand stays as it is, whatever the recipe."""
    assert a.weight is not None
    assert a.side is not None
    rule = policy.rule_for(leaves[a.weight].path)
    if rule is not None and rule.recipe is None:
        by = "rule" if rule in policy.rules else "by default"
        return f"{by}: {rule.reason or rule.pattern}"
    obstacle = _unsupported(a.dot)
    if obstacle:
        return obstacle
    features = sorted((a.dot.free(a.side), a.dot.contraction))
    if features[0] < policy.min_dim:
        return f"weight of {features[0]} features, fewer than min_dim={policy.min_dim}"
    return ""


def _unsupported(dot: Dot) -> str:
    """Why no GEMM in FP8 can stand in for this product."""
    if dot.scope.blocked:
        return dot.scope.blocked
    if dot.primitive != "dot_general":
        return f"{dot.primitive}: no FP8 kernel for it yet"
    for aval in (dot.lhs_aval, dot.rhs_aval, dot.out_aval):
        dtype = aval.dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
            return f"already FP8: {dtype}"
        if dtype not in _DTYPES:
            return f"dtype {dtype}"
        if not aval.size:
            return "no elements"
    if dot.has_batch:
        return "batch dimensions"
    if _is_explicit(dot.out_aval):
        return "explicit sharding: not handled yet"
    return ""


def _is_explicit(aval: Any) -> bool:
    # Under automatic sharding, too, a dot may carry an `out_sharding`: of no meaning.
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ())


def _decide(
    a: Assignment,
    leaves: Sequence[Leaf],
    policy: Policy,
    obstacles: Mapping[int, str],
    whole_step: bool,
) -> _Verdict:
    dot = a.dot
    if dot.primitive == MARKED:
        return _Verdict(None, "by fp8jax itself")
    if a.role == "other" or a.weight is None:
        product = dot.primitive == "dot_general" and not dot.scope.blocked
        return _Verdict(None, _why_other(a, leaves) if product else _unsupported(dot))
    reason = _unsupported(dot) if a.role == "wgrad" else _obstacle(a, leaves, policy)
    if reason:
        return _Verdict(None, reason)
    reasons, recipes = set(), set()
    for layer in a.layers or (a.weight,):
        reasons.add(obstacles.get(layer, "its layer has no forward product here"))
        rule = policy.rule_for(leaves[layer].path)
        recipes.add(policy.recipe if rule is None else rule.recipe)
    if len(reasons) > 1 or len(recipes) > 1:
        return _Verdict(None, UNCLEAR)
    reason, recipe = reasons.pop(), recipes.pop()
    if reason or recipe is None:
        return _Verdict(None, f"as its layer: {reason}")
    return _apply(a, recipe, policy, whole_step)


def _why_other(a: Assignment, leaves: Sequence[Leaf]) -> str:
    paths = [leaves[i].full_path for i in a.suspects if leaves[i].is_float]
    if not paths:
        return a.reason
    return f"{a.reason}; is {' or '.join(paths)} one? Then name it in weights="


def _apply(a: Assignment, recipe: Recipe, policy: Policy, whole_step: bool) -> _Verdict:
    assert a.side is not None
    gemm = _gemm(recipe, a.role)
    if not whole_step:
        if recipe.is_off:
            return _Verdict(None, "the recipe has no GEMM in FP8")
        return _Verdict(LayerDot(recipe, a.side, policy.implementation))
    if gemm is None:
        return _Verdict(None, f"the recipe has no {a.role} in FP8")
    # The named side is the weight, second in its recipe, but wgrad's activation, first.
    named, other = (gemm.lhs, gemm.rhs) if a.role == "wgrad" else (gemm.rhs, gemm.lhs)
    specs = (named, other) if a.side == "lhs" else (other, named)
    return _Verdict(QuantizedDot(a.role, *specs, policy.implementation))


def _gemm(recipe: Recipe, role: Role) -> GemmSpec | None:
    return {"dgrad": recipe.dgrad, "wgrad": recipe.wgrad}.get(role, recipe.fprop)


def _row(
    a: Assignment,
    leaves: Sequence[Leaf],
    verdict: _Verdict,
    kernel_of: Callable[..., str],
) -> Row:
    dot = a.dot
    # Rows of the first operand as recipes count it: activation, or output gradient.
    first: Side = "lhs"
    if a.side is not None:
        first = a.side if a.role == "wgrad" else other_side(a.side)
    specs = _specs(verdict.replacement)
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
        kernel=_kernel(verdict.replacement, specs, kernel_of),
        count=dot.scope.times * dot.batch,
        flops=dot.total_flops,
    )


def _path(a: Assignment, leaves: Sequence[Leaf]) -> str:
    if a.weight is None:
        return a.dot.scope.stack
    layers = a.layers or (a.weight,)
    return " | ".join(dict.fromkeys(leaves[layer].path for layer in layers))


def _specs(replacement: Replacement | None) -> tuple[QuantSpec, ...]:
    if isinstance(replacement, QuantizedDot):
        return replacement.lhs_spec, replacement.rhs_spec
    if isinstance(replacement, LayerDot) and replacement.recipe.fprop is not None:
        gemm = replacement.recipe.fprop
        return gemm.lhs, gemm.rhs
    return ()


def _kernel(
    replacement: Replacement | None,
    specs: tuple[QuantSpec, ...],
    kernel_of: Callable[..., str],
) -> str:
    if replacement is None or not specs:
        return ""
    return kernel_of(*specs, replacement.implementation)
