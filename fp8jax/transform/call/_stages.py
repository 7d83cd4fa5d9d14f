"""Steps traced, lowered and compiled ahead, called with the step's own arguments.

Where those are pytrees of arrays, `jax.stages` has all that. Here is the rest: NNX
modules that are updated in place, and leaves that are no arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any


def filled(
    given: tuple[Any, ...], known: Mapping[int, Any], count: int
) -> tuple[Any, ...]:
    """All positional arguments.

    Args:
        given: those that are not known.
        known: the others, by number.
        count: of all that an earlier call had.
    """
    if not known:
        return given
    left = iter(given)
    first = [known[i] if i in known else next(left, None) for i in range(count)]
    return (*first, *left)


class _Stage:
    """One of `jax.stages`' objects, whose attributes it has.

    Attributes:
        stage: that object.
        call: gives the results of `(compiled, args, kwargs)`.
    """

    def __init__(self, stage: Any, call: Callable[[Any, Any, Any], Any]):
        self.stage = stage
        self.call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)


class Traced(_Stage):
    """As `jax.stages.Traced`."""

    def lower(self, **options: Any) -> "Lowered":
        return Lowered(self.stage.lower(**options), self.call)


class Lowered(_Stage):
    """As `jax.stages.Lowered`."""

    def compile(self, *args: Any, **options: Any) -> "Compiled":
        return Compiled(self.stage.compile(*args, **options), self.call)


class Compiled(_Stage):
    """As `jax.stages.Compiled`: called without the static arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.stage, args, kwargs)
