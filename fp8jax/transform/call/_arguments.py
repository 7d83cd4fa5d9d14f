"""A call's arguments as arrays, and all the rest as one hashable key."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from fp8jax import ops
from fp8jax.transform.call._equinox import in_modules
from fp8jax.transform.call._parameters import Chosen

StaticScalars: TypeAlias = Literal["none", "in Equinox modules", "all"]

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
        placement: and how, if they lie on several and the jit does not say.
    """

    treedef: Any
    statics: tuple[tuple[int, Static], ...]
    spread: ops.Spread
    placement: ops.Placement

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
        static_scalars: which Python numbers are static, too.
        placed: whether the jit says where arguments lie, wherever they came from.
    """

    static: Chosen
    static_scalars: StaticScalars = "none"
    placed: bool = False

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
        indices = self._no_arrays((args, kwargs), leaves)
        statics = tuple((i, _as_static(leaves[i])) for i in indices)
        static = {i for i, _ in statics}
        arrays = [x for i, x in enumerate(leaves) if i not in static]
        spread = ops.spread(*leaves)
        many = spread == ops.Spread.MANY
        tells = many and not self.placed
        placement = ops.placement(arrays) if tells else ops.Placement()
        key = CallKey(treedef, statics, spread, placement)
        if not statics:
            return key, args, kwargs
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
        dynamic = self.dynamic(args, kwargs)
        return not self._no_arrays(dynamic, jax.tree.leaves(dynamic))

    def mark(self, outputs: Any, key: CallKey) -> Any:
        """Results with `StaticOutput`s for what came in as static, such as activations.

        All else that is no array is left for JAX to refuse: it might hold tracers.
        """
        passed = {static for _, static in key.statics}
        leaves, treedef = jax.tree.flatten(outputs)
        for i in self._no_arrays(outputs, leaves):
            static = Static(leaves[i])
            if static in passed or isinstance(leaves[i], _PYTHON_SCALARS):
                leaves[i] = StaticOutput(static)
        return jax.tree.unflatten(treedef, leaves)

    def _no_arrays(self, tree: Any, leaves: Sequence[Any]) -> list[int]:
        """Indices of a tree's leaves that are part of the program."""
        found = [i for i, x in enumerate(leaves) if not _is_array(x)]
        if not found or self.static_scalars == "all":
            return found
        is_static = in_modules(tree) if self.static_scalars != "none" else ()
        return [
            i
            for i in found
            if i in is_static or not isinstance(leaves[i], _PYTHON_SCALARS)
        ]


def _is_array(x: Any) -> bool:
    """Whether a leaf is an array, or stands for one; Python numbers do not."""
    if _is_array_type(type(x)):
        return True
    return isinstance(x, jax.Array) or (hasattr(x, "shape") and hasattr(x, "dtype"))


@functools.cache
def _is_array_type(kind: type) -> bool:
    # Asked for each leaf of each call, and `isinstance` of a `jax.Array` is slow.
    return issubclass(kind, (jax.Array, np.ndarray, np.generic))
