"""A call's arguments as arrays, and all the rest as one hashable key."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from fp8jax import _compat, ops

_PYTHON_SCALARS = (int, float, complex)


class Static:
    """A value that is part of the program: a string, a callable, a static argument.

    Equal by value and type; by identity, if the value cannot be hashed.
    """

    def __init__(self, value: Any):
        self.value = value
        # Once: that of an NNX graph takes longer than all else of a call's key.
        try:
            self._hash = hash(value)
            self._identity = (type(value), value)
        except TypeError:
            self._hash = id(value)
            self._identity = (type(value), id(value))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._identity == other._identity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticOutput:
    """A result that is no array, in the structure of a traced function's results."""

    static: Static = dataclasses.field(metadata={"static": True})


def _is_mark(x: Any) -> bool:
    return isinstance(x, StaticOutput)


def has_static_outputs(out_tree: Any) -> bool:
    """Whether results of this structure hold a `StaticOutput`."""
    leaves = [None] * out_tree.num_leaves
    outputs = jax.tree.unflatten(out_tree, leaves)
    return any(map(_is_mark, jax.tree.leaves(outputs, is_leaf=_is_mark)))


def without_marks(outputs: Any) -> Any:
    """Results as the function gave them: `ArgumentOptions.mark` undone."""
    return jax.tree.map(
        lambda x: x.static.value if _is_mark(x) else x, outputs, is_leaf=_is_mark
    )


@dataclasses.dataclass(frozen=True)
class CallKey:
    """What of a call is no array. Hashable.

    Attributes:
        treedef: of `(args, kwargs)`, static arguments being one leaf each.
        statics: the static leaves, by index.
        donated: indices of the leaves that are donated.
        spread: over how many devices the arrays lie.
    """

    treedef: Any
    statics: tuple[tuple[int, Static], ...]
    donated: tuple[int, ...]
    spread: ops.Spread

    def arguments(
        self, donated: Sequence[Any], kept: Sequence[Any], with_statics: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs`; static leaves are None if they are not wanted."""
        statics = {i: s.value if with_statics else None for i, s in self.statics}
        from_donated, from_kept = iter(donated), iter(kept)
        leaves = []
        for i in range(self.treedef.num_leaves):
            if i in statics:
                leaves.append(statics[i])
            else:
                leaves.append(next(from_donated if i in self.donated else from_kept))
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class ArgumentOptions:
    """Which arguments are static and which are donated, by number and by name.

    Attributes:
        static_numbers, static_names, donated_numbers, donated_names: of arguments.
        static_scalars: whether Python numbers are static, too.
    """

    static_numbers: frozenset[int]
    static_names: frozenset[str]
    donated_numbers: frozenset[int]
    donated_names: frozenset[str]
    static_scalars: bool = False

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        static_argnums: int | Collection[int],
        static_argnames: str | Collection[str],
        donate_argnums: int | Collection[int],
        donate_argnames: str | Collection[str],
    ) -> "ArgumentOptions":
        """Those given, those of `fn` if it is a `jax.jit` object, and their names."""
        jit = _compat.jit_options(fn)
        names = _parameter_names(fn)
        pairs = (
            (static_argnums, jit.static_argnums, static_argnames, jit.static_argnames),
            (donate_argnums, jit.donate_argnums, donate_argnames, jit.donate_argnames),
        )
        sets = []
        for given, of_jit, given_names, jit_names in pairs:
            numbers = {*_several(given, "argnums", int), *of_jit}
            numbers = {n + len(names) if n < 0 else n for n in numbers}
            strings = {*_several(given_names, "argnames", str), *jit_names}
            numbers |= {i for i, name in enumerate(names) if name in strings}
            strings |= {name for i, name in enumerate(names) if i in numbers}
            sets += [frozenset(numbers), frozenset(strings)]
        return cls(*sets, static_scalars=jit.static_scalars)

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallKey, list[Any], list[Any]]:
        """The call's key, its donated arrays and its other arrays."""
        if self.static_numbers or self.static_names:
            args = tuple(
                Static(x) if i in self.static_numbers else x for i, x in enumerate(args)
            )
            kwargs = {
                name: Static(x) if name in self.static_names else x
                for name, x in kwargs.items()
            }
        leaves, treedef = jax.tree.flatten((args, kwargs))
        statics = tuple(
            (i, x if isinstance(x, Static) else Static(x))
            for i, x in enumerate(leaves)
            if not self._is_array(x)
        )
        spread = ops.spread(*leaves)
        donated = _donated(treedef, self.donated_numbers, self.donated_names)
        if not statics and not donated:
            return CallKey(treedef, (), (), spread), [], leaves
        static = {i for i, _ in statics}
        donated = tuple(i for i in donated if i not in static)
        kept = [x for i, x in enumerate(leaves) if i not in static and i not in donated]
        key = CallKey(treedef, statics, donated, spread)
        return key, [leaves[i] for i in donated], kept

    def mark(self, outputs: Any, key: CallKey) -> Any:
        """Results with `StaticOutput`s for what came in as static, such as activations.

        All else that is no array is left for JAX to refuse: it might hold tracers.
        """
        passed = {static for _, static in key.statics}

        def marked(x: Any) -> Any:
            if self._is_array(x):
                return x
            static = Static(x)
            is_known = static in passed or isinstance(x, _PYTHON_SCALARS)
            return StaticOutput(static) if is_known else x

        return jax.tree.map(marked, outputs)

    def _is_array(self, x: Any) -> bool:
        if _is_array_type(type(x)):
            return True
        if isinstance(x, _PYTHON_SCALARS):
            return not self.static_scalars
        return isinstance(x, jax.Array) or (hasattr(x, "shape") and hasattr(x, "dtype"))


@functools.cache
def _is_array_type(kind: type) -> bool:
    # Asked for each leaf of each call, and `isinstance` of a `jax.Array` is slow.
    return issubclass(kind, (jax.Array, np.ndarray, np.generic))


@functools.lru_cache(maxsize=256)
def _donated(
    treedef: Any, numbers: frozenset[int], names: frozenset[str]
) -> tuple[int, ...]:
    if not numbers and not names:
        return ()
    args, kwargs = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    chosen = [x for i, x in enumerate(args) if i in numbers]
    chosen += [x for name, x in kwargs.items() if name in names]
    return tuple(sorted(jax.tree.leaves(chosen)))


def _several(given: Any, what: str, kind: type) -> tuple[Any, ...]:
    values = (given,) if isinstance(given, (int, str)) else tuple(given)
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"fp8_transform takes static_{what} and donate_{what} of {kind.__name__}, "
            f"got {given!r}."
        )
    return values


def _parameter_names(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]
