"""A call's arguments as arrays, and all the rest as one hashable key."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from fp8jax import ops
from fp8jax.transform._parameters import Chosen

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


def _as_static(x: Any) -> Static:
    return x if isinstance(x, Static) else Static(x)


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
        spread: over how many devices the arrays lie.
    """

    treedef: Any
    statics: tuple[tuple[int, Static], ...]
    spread: ops.Spread

    def arguments(
        self, arrays: Iterable[Any], with_statics: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs`; static leaves are None if they are not wanted."""
        statics = {i: s.value if with_statics else None for i, s in self.statics}
        left = iter(arrays)
        leaves = [
            statics[i] if i in statics else next(left)
            for i in range(self.treedef.num_leaves)
        ]
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class ArgumentOptions:
    """What of a call is static.

    Attributes:
        static: arguments.
        static_scalars: whether Python numbers are static, too.
    """

    static: Chosen
    static_scalars: bool = False

    def with_statics(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a `Static` around each that is static."""
        if not self.static:
            return args, kwargs
        numbers, names = self.static.numbers, self.static.names
        return (
            tuple(_as_static(x) if i in numbers else x for i, x in enumerate(args)),
            {name: _as_static(x) if name in names else x for name, x in kwargs.items()},
        )

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallKey, tuple[Any, ...], dict[str, Any]]:
        """The call's key, and its arguments with None for all that is static."""
        args, kwargs = self.with_statics(args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        statics = tuple(
            (i, _as_static(x)) for i, x in enumerate(leaves) if not self._is_array(x)
        )
        key = CallKey(treedef, statics, ops.spread(*leaves))
        if not statics:
            return key, args, kwargs
        static = {i for i, _ in statics}
        arrays = [x for i, x in enumerate(leaves) if i not in static]
        return key, *key.arguments(arrays, with_statics=False)

    def dynamic(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Without the static arguments, as compiled functions are called."""
        numbers, names = self.static.numbers, self.static.names
        return (
            tuple(x for i, x in enumerate(args) if i not in numbers),
            {name: x for name, x in kwargs.items() if name not in names},
        )

    def all_arrays(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all but the static arguments are pytrees of arrays."""
        return all(map(self._is_array, jax.tree.leaves(self.dynamic(args, kwargs))))

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
