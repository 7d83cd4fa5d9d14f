"""The function's arguments: leaves, their paths, and which are parameters.

A leaf's full path is the argument's name and the key path in it, `"state/params/up/
kernel"`. Dots are named by their weight's path without the argument's name.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fp8jax._described import described
from fp8jax.quant import QTensor
from fp8jax.transform._frozen import frozen_leaves
from fp8jax.transform._gradients import operands_of
from fp8jax.transform._roles import differentiated_leaves, is_whole_step
from fp8jax.transform._values import Dot, other_side
from fp8jax.transform._weights import Parameters

Weights: TypeAlias = Callable[[str], bool] | int | str | Collection[int | str] | None

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


def leaves_of(names: Sequence[str], args: Sequence[Any], kwargs: Any) -> list[Leaf]:
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


def positional_names(fn: Any, count: int) -> list[str]:
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


def check_weights(weights: Weights) -> None:
    """Raises ValueError, on behalf of `fp8_transform`, for what names no arguments."""
    if weights is None or callable(weights) or isinstance(weights, (int, str)):
        return
    if isinstance(weights, Collection) and all(
        isinstance(w, (int, str)) for w in weights
    ):
        return
    raise ValueError(
        "fp8_transform takes weights=None, a predicate on paths like "
        "'state/params/up/kernel', or the numbers or names of the arguments that are "
        f"parameters, got {described(weights)}."
    )


def weights_after(weights: Weights, count: int) -> Weights:
    """The same weights, after `count` more positional arguments."""
    if isinstance(weights, int):
        return weights + count
    if weights is None or callable(weights) or isinstance(weights, str):
        return weights
    return [w + count if isinstance(w, int) else w for w in weights]


def weight_mask(
    weights: Weights,
    leaves: Sequence[Leaf],
    dots: Sequence[Dot],
    updated: int,
    returned: int,
) -> int:
    """Which leaves are parameters, as `Value.leaves`.

    What `weights` says; else the leaves that the step differentiates, frozen ones
    that gradients pass on the way, and the siblings of both; else, in a forward pass,
    QTensors, beside which arrays stay as they are; else those in `params`, or of type
    `nnx.Param`; else, if the function is a forward pass, those of the first argument,
    if that is a container.

    Args:
        weights: what the user said.
        leaves: of the arguments.
        dots: of the function.
        updated: `Value.leaves` of what gradients go into.
        returned: `Value.leaves` of those of which a result may be the gradient.

    Raises:
        ValueError: If `weights` names an argument that the call lacks.
    """
    if weights is not None:
        return _mask(_named(weights, leaves))
    if is_whole_step(dots):
        is_float = [leaf.is_float for leaf in leaves]
        sure, unsure = differentiated_leaves(dots, is_float, updated)
        unsure = unsure & returned or unsure
        found = sure | _of_families(sure, unsure, leaves)
        found &= ~_inputs(found, leaves, dots)
        if found:
            return found | _siblings(found, leaves, dots)
    stored = [leaf.is_stored for leaf in leaves]
    if any(stored) and not is_whole_step(dots):
        return _mask(stored)
    hinted = [leaf.is_param for leaf in leaves]
    if any(hinted) or is_whole_step(dots):
        return _mask(hinted)
    return _mask([leaf.number == 0 and bool(leaf.keys) for leaf in leaves])


def _of_families(sure: int, unsure: int, leaves: Sequence[Leaf]) -> int:
    """Of leaves whose gradient may be another's, those beside a leaf that is sure.

    A teacher's first layer meets the student's input and has its sizes, and a batch of
    real images meets the weight that generated ones meet. If none is sure, those in
    containers, or else all of them.
    """
    families = _families(sure, leaves)
    if families:
        return unsure & _mask([leaf.family in families for leaf in leaves])
    return unsure & _mask([bool(leaf.keys) for leaf in leaves]) or unsure


def _inputs(found: int, leaves: Sequence[Leaf], dots: Sequence[Dot]) -> int:
    """Of leaves with a gradient, arrays that meet one in a container: data, then."""
    bare = _mask([not leaf.keys for leaf in leaves]) & found
    inputs = 0
    for dot, side in operands_of(dots) if bare else ():
        x, weight = dot.operand(side), dot.operand(other_side(side))
        if dot.scope.phase == "forward" and weight.versions & found & ~bare:
            inputs |= 0 if x.others else x.versions & bare
    return inputs


def _siblings(found: int, leaves: Sequence[Leaf], dots: Sequence[Dot]) -> int:
    """Leaves beside trained parameters, and frozen ones with those beside them."""
    parameters = parameters_of(found, dots, leaves)
    frozen = frozen_leaves(dots, parameters) & ((1 << len(leaves)) - 1)
    frozen |= _mask([leaf.is_stored for leaf in leaves])
    near = _families(found, leaves)
    near |= _families(frozen, leaves) - _families(parameters.data, leaves)
    # Codes of a base may be integers, as those of its other layers are.
    stored = {(leaf.family, leaf.is_float) for leaf in _chosen(frozen, leaves)}
    beside = [
        leaf.family in near
        and (leaf.is_float or (leaf.family, leaf.is_float) in stored)
        for leaf in leaves
    ]
    return _mask(beside) & ~parameters.data


def parameters_of(mask: int, dots: Sequence[Dot], leaves: Sequence[Leaf]) -> Parameters:
    """The parameters among leaves, with what is data beside them."""
    keys = _mask([leaf.is_key for leaf in leaves])
    return Parameters.of(mask, dots, [leaf.size for leaf in leaves], keys)


def _families(chosen: int, leaves: Sequence[Leaf]) -> set[tuple[str, ...]]:
    return {leaf.family for leaf in _chosen(chosen, leaves)}


def _chosen(chosen: int, leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for i, leaf in enumerate(leaves) if chosen >> i & 1]


def _named(weights: Any, leaves: Sequence[Leaf]) -> list[bool]:
    if callable(weights):
        return [bool(weights(leaf.full_path)) for leaf in leaves]
    names = {weights} if isinstance(weights, (int, str)) else set(weights)
    known = {leaf.argument for leaf in leaves} | {leaf.number for leaf in leaves}
    if not names <= known:
        arguments = dict.fromkeys(leaf.argument for leaf in leaves)
        raise ValueError(
            f"fp8_transform was given weights={weights!r}, but this call's arguments "
            f"that hold arrays are {', '.join(arguments)}."
        )
    return [leaf.argument in names or leaf.number in names for leaf in leaves]


def _mask(chosen: Sequence[bool]) -> int:
    return sum(1 << i for i, is_chosen in enumerate(chosen) if is_chosen)
