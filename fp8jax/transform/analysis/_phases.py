"""Which pass of a train step an equation belongs to, by its name stack.

A name stack holds two kinds of names, which only its text confuses: the user's scopes,
and the derivatives that JAX took. `transpose` and `jvp` of the second kind mark the
backward pass, `jvp` alone the forward pass. In the backward pass, one more `jvp`, or a
scope called `rematted_computation`, marks a recomputation; unless the forward pass has
the same name, for then the equation is the transpose of one of that name.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias

from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir import is_differentiated

Phase = Literal["outside", "forward", "recompute", "backward"]
Names: TypeAlias = tuple[_compat.Name, ...]

JVP = _compat.Name("jvp", is_derivative=True)
TRANSPOSE = _compat.Name("transpose", is_derivative=True)
_REMATTED = _compat.Name("rematted_computation")
_OURS = ("checkpoint", _REMATTED.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """The place of an equation, or of a jaxpr's equations, in a train step.

    Attributes:
        phase: the pass.
        names: from the outermost to the equation's own.
    """

    phase: Phase = "outside"
    names: Names = ()

    @property
    def scope(self) -> tuple[str, ...]:
        """The user's own names: the same in the forward and the backward pass."""
        texts = (name.text for name in self.names if not name.is_derivative)
        # Remat below a scope repeats it, a nested function's in full.
        return tuple(dict.fromkeys(text for text in texts if text not in _OURS))


OUTSIDE = Pass()


class Passes:
    """Tells the pass of one equation after another, in the program's order."""

    def __init__(self) -> None:
        self._forward: set[Names] = set()  # Names that only look like recomputations.

    def at(self, outer: Pass, eqn: JaxprEqn) -> Pass:
        """The pass of an equation.

        Args:
            outer: of the jaxpr that it is in: the pass of the equation around that.
            eqn: the equation.
        """
        own = _compat.names_of(eqn)
        if not own:
            return outer
        if is_differentiated(eqn):
            own = _without_repetition(own, outer.phase)
        names = outer.names + own
        if not any(name.is_derivative or name == _REMATTED for name in own):
            return Pass(outer.phase, names)
        phase, marks = self._read(names)
        if phase == "forward":
            self._forward.update(marks)
        return Pass(phase, names)

    def _read(self, names: Names) -> tuple[Phase, list[Names]]:
        """The pass of these names; from its first `jvp` to each mark after it."""
        phase: Phase = "outside"
        start, marks = 0, []
        for i, name in enumerate(names):
            if name == JVP and (phase == "outside" or _is_transposed(names, i)):
                phase = "backward" if _is_transposed(names, i) else "forward"
                start, marks = i, []
            elif name in (JVP, _REMATTED) and phase != "outside":
                marks.append(names[start : i + 1])
                if phase == "backward" and marks[-1] not in self._forward:
                    phase = "recompute"
        return phase, marks


def is_second_order(passes: Iterable[Pass]) -> bool:
    """Whether a backward pass is differentiated: a gradient within another one's loss.

    A gradient rule that computes gradients ahead, in its forward half, is none: nothing
    of it is transposed once more.
    """
    inner: set[Names] = set()
    transposed: set[Names] = set()
    steps = False
    for names in {one.names for one in passes}:
        outermost: Phase = "outside"
        for i, name in enumerate(names):
            if name != JVP:
                continue
            if outermost == "outside":
                start = i
                outermost = "backward" if _is_transposed(names, i) else "forward"
            elif _is_transposed(names, i):
                within = inner if outermost == "forward" else transposed
                within.add(names[start : i + 1])
        steps = steps or outermost == "backward"
    return bool(inner and not steps) or not inner.isdisjoint(transposed)


def _is_transposed(names: Names, i: int) -> bool:
    return i > 0 and names[i - 1] == TRANSPOSE


def _without_repetition(own: Names, outer: Phase) -> Names:
    """The names of a differentiated remat equation, each once.

    JAX gives it all that were around its function after those that it has already.
    """
    pairs = [i + 1 for i, _ in enumerate(own) if _is_transposed(own, i)]
    if not pairs and outer in ("outside", "forward"):
        return own
    start = pairs[-1] if pairs else 0
    repeated = [i + 1 for i, name in enumerate(own) if name == JVP and i >= start]
    return own[:start] + own[(repeated or [start])[-1] :]
