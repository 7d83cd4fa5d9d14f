"""The function's arguments: leaves and their paths.

A leaf's full path is the argument's name and the key path in it, `"state/params/up/
kernel"`. Dots are named by their weight's path without the argument's name.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.quant import QTensor

_PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array among the arguments.

    Attributes:
        argument: name of the argument.
        number: of a positional argument, else None.
        keys: key path in the argument.
        is_param: whether its type says that it is a parameter.
        size: elements.
        is_float: whether it can be differentiated.
        is_stored: whether it holds the codes or the scales of a QTensor.
        is_key: whether it is the state of a random number generator.
        shows_argument: whether reports name the argument, too.
    """

    argument: str
    number: int | None
    keys: tuple[str, ...]
    is_param: bool
    size: int
    is_float: bool
    is_stored: bool = False
    is_key: bool = False
    shows_argument: bool = False

    @property
    def full_path(self) -> str:
        return "/".join((self.argument, *self.keys))

    @property
    def path(self) -> str:
        return "/".join(self.keys) or self.argument

    @property
    def shown(self) -> str:
        """What reports and statistics call it."""
        return self.full_path if self.shows_argument else self.path

    @property
    def family(self) -> tuple[str, ...]:
        """What its siblings among the parameters share: up to `params`, if any."""
        if _PARAMS in self.keys:
            return (self.argument, *self.keys[: self.keys.index(_PARAMS) + 1])
        return (self.argument,)


def leaves_of(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Leaf]:
    """The leaves of a call's arguments, in the order of `jax.tree.leaves`.

    Args:
        names: of the positional arguments.
        args, kwargs: the arguments, of arrays or of anything with a shape and dtype.
    """
    found = []
    for number, (name, arg) in enumerate(zip(names, args, strict=True)):
        found += _leaves(name, number, arg)
    for name, arg in sorted(kwargs.items()):
        found += _leaves(name, None, arg)
    return found


def positional_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Names of a function's first `count` positional arguments."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = []
    for i in range(count):
        parameter = parameters[min(i, len(parameters) - 1)] if parameters else None
        if parameter is None or i >= len(parameters):
            names.append(f"arg{i}")
        elif parameter.kind is parameter.VAR_POSITIONAL:
            parameters = parameters[: i + 1]
            names.append(f"{parameter.name}{i}")
        else:
            names.append(parameter.name)
    return names


def _leaves(name: str, number: int | None, arg: Any) -> list[Leaf]:
    found = []
    # Variables of NNX are nodes that hold one array: their type says what they are.
    flat, _ = jax.tree_util.tree_flatten_with_path(arg, is_leaf=_is_node)
    for keys, node in flat:
        for x, is_stored in _arrays(node):
            keys_in_argument = tuple(map(_key_name, keys))
            found.append(
                Leaf(
                    argument=name,
                    number=number,
                    keys=keys_in_argument,
                    is_param=_is_param(node) or _PARAMS in keys_in_argument,
                    size=math.prod(_aval(x).shape),
                    is_float=jnp.issubdtype(_aval(x).dtype, jnp.floating),
                    is_stored=is_stored,
                    is_key=_is_key(_aval(x)),
                )
            )
    return found


def _aval(x: Any) -> Any:
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else jax.typeof(x)


def _is_key(x: Any) -> bool:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return x.dtype == jnp.uint32 and x.shape[-1:] == (2,)  # As by `jax.random.PRNGKey`.


def _class_names(x: Any) -> set[str]:
    return {
        cls.__name__ for cls in type(x).__mro__ if cls.__module__.startswith("flax.nnx")
    }


def _is_node(x: Any) -> bool:
    return _is_variable(x) or _is_box(x) or isinstance(x, QTensor)


def _arrays(node: Any) -> list[tuple[Any, bool]]:
    """Arrays of a node of a tree, and whether they are a QTensor's."""
    found = []
    for x in jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, QTensor)):
        is_stored = isinstance(x, QTensor)
        found += [(a, is_stored) for a in (jax.tree.leaves(x) if is_stored else [x])]
    return found


def _is_variable(x: Any) -> bool:
    return not _class_names(x).isdisjoint({"Variable", "VariableState"})


def _is_box(x: Any) -> bool:
    """Whether it is one of Linen's boxes, of an array and its partitioning."""
    names = {(cls.__module__, cls.__name__) for cls in type(x).__mro__}
    return ("flax.core.meta", "AxisMetadata") in names


def _is_param(x: Any) -> bool:
    return "Param" in _class_names(x)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
