"""A program on its way through the passes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fp8jax.transform.ir import AnyJaxpr, Calls, Position


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, and what the passes over it know.

    Attributes:
        jaxpr: the program.
        is_weight: for each input, whether it is a parameter.
        replacements: by position, what becomes of equations that products are.
        measures: whether each product in FP8 is measured, too.
        calls: those of our own in it.
        is_rule: whether it is a half of a function's own gradient rule, of which
            nothing is differentiated any more.
        collected: for each product that is measured, in program order, which of the
            results after the program's own has its moments; None for those in
            constructs that keep theirs.
    """

    jaxpr: AnyJaxpr
    is_weight: tuple[bool, ...] = ()
    replacements: Mapping[Position, Any] = dataclasses.field(default_factory=dict)
    measures: bool = False
    calls: Calls = dataclasses.field(default_factory=Calls)
    is_rule: bool = False
    collected: tuple[int | None, ...] = ()

    def of(self, jaxpr: AnyJaxpr) -> "Program":
        """Replaces the jaxpr."""
        return self if jaxpr is self.jaxpr else dataclasses.replace(self, jaxpr=jaxpr)
