"""What the user asked for, and what it says about one layer."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from fp8jax.recipes import (
    DEFAULT_SKIPS,
    GEMM_NAMES,
    GemmName,
    GemmSpec,
    Recipe,
    Residual,
    Rule,
    skip_narrow,
)

# Of a weight: its path within its argument first, then others that rules may match.
Names: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the user asked for.

    Attributes:
        recipe: of layers that no rule is about.
        rules: the user's, in order; the default ones come after them.
        min_dim: of the last default rule, which skips narrower weights.
        implementation: as in `fp8jax.dot_general`.
        stats: whether quantization errors are measured, too.
        weight_dtype: of the arrays that the function sees for QTensors.
        found: default rules about this program, by what its products are for.
        custom_rules: patterns of names of functions with a gradient rule of their own
            that are rewritten, rule and all.
        without: names of passes that do not run.
    """

    recipe: Recipe
    rules: tuple[Rule, ...]
    min_dim: int
    implementation: str | None
    stats: bool = False
    weight_dtype: jax.typing.DTypeLike = jnp.bfloat16
    custom_rules: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()
    found: tuple[Rule, ...] = ()

    def rule_for(self, names: Names, role: GemmName, k: int, n: int) -> Rule | None:
        # An argument's name is for the user to match: `head` may be a whole network.
        several = (
            (self.rules, names),
            (DEFAULT_SKIPS, names[:1]),
            (self.found, names),
            ((skip_narrow(self.min_dim),), names[:1]),
        )
        found = (_first(rules, seen, role, k, n) for rules, seen in several)
        return next((rule for rule in found if rule is not None), None)

    def users_rule_for(
        self, names: Names, role: GemmName, k: int, n: int
    ) -> Rule | None:
        """As `rule_for`, without the default rules."""
        return _first(self.rules, names, role, k, n)

    def gemm(
        self, names: Names, role: GemmName, k: int, n: int
    ) -> tuple[GemmSpec | None, str]:
        """How a GEMM of the weight [k, n] is quantized, or why it is not."""
        rule = self.rule_for(names, role, k, n)
        if rule is not None and rule.gives.is_off:
            by = "rule" if rule in self.rules else "by default"
            return None, f"{by}: {rule.reason or rule.pattern}"
        spec = getattr(self.recipe if rule is None else rule.gives, role)
        return spec, "" if spec else f"the recipe has no {role} in FP8"

    def layer(self, names: Names, k: int, n: int) -> Recipe:
        """All three GEMMs of the weight [k, n], of as many rules."""
        specs = {role: self.gemm(names, role, k, n)[0] for role in GEMM_NAMES}
        return Recipe(**specs, residual=self.residual(names, k, n))

    def residual(self, names: Names, k: int, n: int) -> Residual:
        """What is kept of the input of the weight [k, n]."""
        if any(self.gemm(names, role, k, n)[0] is None for role in GEMM_NAMES):
            return "bf16"
        rule = self.rule_for(names, "fprop", k, n)
        return (self.recipe if rule is None else rule.gives).residual


def _first(
    rules: Sequence[Rule], names: Names, role: GemmName, k: int, n: int
) -> Rule | None:
    for rule in rules:
        if any(rule.matches(name, role, k, n) for name in names):
            return rule
    return None
