"""Which arguments of a function are meant, by number and by name."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

_T = TypeVar("_T", int, str)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some of a function's arguments, by number and by name."""

    numbers: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.numbers or self.names)

    def __or__(self, other: "Chosen") -> "Chosen":
        return Chosen(self.numbers | other.numbers, self.names | other.names)

    def after(self, count: int) -> "Chosen":
        """The same arguments, after `count` more positional ones."""
        return Chosen(frozenset(n + count for n in self.numbers), self.names)


NONE = Chosen()


def chosen(
    kind: str,
    argnums: int | Collection[int],
    argnames: str | Collection[str],
    fn: Callable[..., Any],
    bound: int,
) -> Chosen:
    """What `fp8_transform` was told of arguments.

    Args:
        kind: `"static"` or `"donate"`.
        argnums, argnames: as in `jax.jit`.
        fn: the function.
        bound: how many of its positional arguments are given already, and not counted.

    Raises:
        ValueError: If they are no numbers and names, or of no argument.
    """
    numbers = _several(kind, "argnums", argnums, int)
    names = frozenset(_several(kind, "argnames", argnames, str))
    parameters = _parameters_of(fn)
    if parameters is not None:
        visible = len(parameters.positional) - bound
        numbers = [n + visible if n < 0 else n for n in numbers]
        known = {*parameters.positional, *parameters.keyword_only}
        unknown = [n for n in numbers if n < 0 or n >= visible]
        unknown = [] if parameters.takes_more else unknown
        unknown += [] if parameters.takes_any_name else sorted(names - known)
        if unknown:
            raise ValueError(
                f"fp8_transform({name_of(fn)}) takes {kind}_argnums and "
                f"{kind}_argnames of its arguments {', '.join(sorted(known))}; got "
                f"{', '.join(map(repr, unknown))}."
            )
    return completed(Chosen(frozenset(numbers), names).after(bound), fn)


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """Of a function: names, and whether it takes arguments without any."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    takes_more: bool
    takes_any_name: bool


def _parameters_of(fn: Callable[..., Any]) -> _Parameters | None:
    """A function's parameters, if they are known."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = [p.kind for p in parameters]
    one = inspect.Parameter
    positional = (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    return _Parameters(
        tuple(p.name for p in parameters if p.kind in positional),
        tuple(p.name for p in parameters if p.kind is one.KEYWORD_ONLY),
        one.VAR_POSITIONAL in kinds,
        one.VAR_KEYWORD in kinds,
    )


def completed(chosen: Chosen, fn: Callable[..., Any]) -> Chosen:
    """With the names of those given by number, and the numbers of those by name."""
    parameters = _parameters_of(fn)
    if parameters is None:
        return chosen
    names = list(enumerate(parameters.positional))
    numbers = {n + len(names) if n < 0 else n for n in chosen.numbers}
    numbers |= {i for i, name in names if name in chosen.names}
    return Chosen(
        frozenset(numbers),
        chosen.names | {name for i, name in names if i in numbers},
    )


def name_of(fn: Callable[..., Any]) -> str:
    """A function's name, for messages and the compiled program."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def _several(
    kind: str, what: str, given: _T | Collection[_T], type_: type[_T]
) -> list[_T]:
    values: list[Any] = [given]
    if isinstance(given, Collection) and not isinstance(given, str):
        values = list(given)
    if not all(isinstance(value, type_) for value in values):
        raise ValueError(
            f"fp8_transform takes {kind}_{what} of {type_.__name__}, got {given!r}."
        )
    return values
