"""Functions that update NNX modules in place, as pure functions and back.

Flax is never imported here: where it is not, there are no modules either.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fp8jax.transform.call._arguments import Static, StaticOutput
from fp8jax.transform.call._leaves import Leaf, leaves_of, positional_names
from fp8jax.transform.call._modules import is_module, is_module_or_state
from fp8jax.transform.call._outer_jit import OuterJit
from fp8jax.transform.call._parameters import Chosen, name_of

# NNX knows by it which modules inside of a function are those outside.
_CONTEXT = "fp8_transform"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeState:
    """A module's arrays, in its place among the arguments."""

    state: Any


def _is_node_state(x: Any) -> bool:
    return isinstance(x, NodeState)


@dataclasses.dataclass(frozen=True)
class NnxCall:
    """A call's arguments without modules.

    Attributes:
        graphdef: what of all modules is no array.
        args, kwargs: the arguments, with a `NodeState` for each module.
        nodes: the modules.
    """

    graphdef: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nodes: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "NnxCall":
        nnx: Any = sys.modules["flax.nnx"]
        arguments = args, kwargs
        leaves, treedef = jax.tree.flatten(arguments, is_leaf=is_module_or_state)
        nodes = tuple(x for x in leaves if is_module(x))
        # All at once: what two of them share is an array of the first.
        graphdef, state = nnx.split(nodes)
        states = iter(_states(state, len(nodes)))
        leaves = [next(states) if is_module(x) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        return cls(graphdef, args, kwargs, nodes)

    def update(self, states: Sequence[NodeState], changed: Any) -> None:
        """Puts new arrays into the modules, in place.

        Args:
            states: of each module.
            changed: the graph that they became, if the function changed it.
        """
        nnx: Any = sys.modules["flax.nnx"]
        if changed is None:
            nnx.update(self.nodes, _state(states))
            return
        with nnx.update_context(_CONTEXT):
            with nnx.split_context(_CONTEXT) as context:
                context.split(self.nodes)
            with nnx.merge_context(_CONTEXT, inner=False) as context:
                context.merge(changed, _state(states))


def _states(state: Any, count: int) -> list[NodeState]:
    """Of each of several modules, of the state of their tuple."""
    nnx: Any = sys.modules["flax.nnx"]
    none = nnx.State({})
    return [NodeState(state.get(i, none)) for i in range(count)]


def _state(states: Sequence[NodeState]) -> Any:
    nnx: Any = sys.modules["flax.nnx"]
    return nnx.State({i: node.state for i, node in enumerate(states)})


@dataclasses.dataclass(frozen=True)
class PureFunction:
    """An NNX function of arrays.

    It takes a graphdef before the function's own arguments, of which modules are
    `NodeState`s, and gives `(output, new NodeStates, changed)`: the graphdef that the
    modules have then, as a `StaticOutput`, or None if that is what they came with.

    Attributes:
        fn: the function; it may update its arguments.
        keeps_graph: whether it may not change their graph: what each array of a module
            is told of its sharding is so of the arrays that came.
    """

    fn: Callable[..., Any]
    keeps_graph: bool

    @property
    def __name__(self) -> str:
        return name_of(self.fn)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.fn

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, for the names of arguments in JAX's errors."""
        try:
            parameters = inspect.signature(self.fn).parameters.values()
        except ValueError as error:
            raise AttributeError("no signature") from error
        first = inspect.Parameter("graphdef", inspect.Parameter.POSITIONAL_ONLY)
        return inspect.Signature([first, *parameters])

    def __call__(
        self, graphdef: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, list[NodeState], StaticOutput | None]:
        nnx: Any = sys.modules["flax.nnx"]
        with nnx.update_context(_CONTEXT):
            return self._within(nnx, graphdef, args, kwargs)

    def _within(
        self, nnx: Any, graphdef: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[NodeState], StaticOutput | None]:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node_state)
        state = _state([x for x in leaves if _is_node_state(x)])
        with nnx.split_context(_CONTEXT) as context:
            context.split(nnx.merge(graphdef, state))  # In the place of those outside.
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            nodes = context.merge(graphdef, state)
        left = iter(nodes)
        leaves = [next(left) if _is_node_state(x) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        output = self.fn(*args, **kwargs)
        new_graphdef, new_state = nnx.split(nodes)
        if new_graphdef == graphdef:
            return output, _states(new_state, len(nodes)), None
        if self.keeps_graph:
            raise ValueError(
                f"fp8_transform({self.__name__}): the function changed the structure "
                "of its NNX arguments, of whose arrays an nnx.StateSharding among "
                "in_shardings says where each one lies. Give modules one sharding, or "
                "use nnx.split outside and nnx.merge inside of the function."
            )
        with nnx.split_context(_CONTEXT) as context:
            new_graphdef, new_state = context.split(nodes)
        changed = StaticOutput(Static(new_graphdef))
        return output, _states(new_state, len(nodes)), changed

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Leaf]:
        """The leaves of this function's arguments, named as those of `fn`."""
        args, kwargs = jax.tree.map(
            lambda x: x.state if _is_node_state(x) else x,
            (args, kwargs),
            is_leaf=_is_node_state,
        )
        names = positional_names(self.fn, len(args) - 1)
        return leaves_of(names, args[1:], kwargs)


def pure_jit(outer: OuterJit, call: NnxCall) -> OuterJit:
    """How the pure function is to be jitted, if `outer` is told of the function.

    Modules have the same sharding after the call as before, as with `nnx.jit`.

    Args:
        outer: the function, and how it is to be jitted.
        call: of the structure that shardings are for.
    """
    graphdef = Chosen(frozenset({0}))
    in_shardings, of_nodes = _placed(outer, call)
    if isinstance(in_shardings, tuple):
        in_shardings = (None, *in_shardings)
    is_told = in_shardings is not None or outer.out_shardings is not None
    return dataclasses.replace(
        outer,
        fn=PureFunction(outer.fn, any(map(_is_node_state, of_nodes or ()))),
        static=graphdef | outer.static.after(1),
        donated=outer.donated.after(1),
        in_shardings=in_shardings,
        out_shardings=(outer.out_shardings, of_nodes, None) if is_told else None,
    )


def _placed(outer: OuterJit, call: NnxCall) -> tuple[Any, Any]:
    """Shardings of a call's arguments, and of each module among them."""
    if outer.in_shardings is None:
        return None, None
    nnx: Any = sys.modules["flax.nnx"]
    told, treedef = jax.tree.flatten(outer.in_shardings, is_leaf=lambda x: x is None)
    try:
        parts = treedef.flatten_up_to(call.args)
    except ValueError as error:
        raise ValueError(
            f"fp8_transform({name_of(outer.fn)}) takes in_shardings of the structure "
            "of its arguments, with one sharding or an nnx.StateSharding for an NNX "
            f"module, got {outer.in_shardings!r}."
        ) from error
    shardings, of_nodes = [], []
    for sharding, part in zip(told, parts, strict=True):
        if isinstance(sharding, nnx.StateSharding):
            placed = jax.tree.map(
                lambda x, s=sharding: _of_state(s, x) if _is_node_state(x) else None,
                part,
                is_leaf=_is_node_state,
            )
            leaves = jax.tree.leaves(placed, is_leaf=_is_node_state)
            of_nodes += [x for x in leaves if _is_node_state(x)]
            shardings.append(placed)
        else:
            leaves = jax.tree.leaves(part, is_leaf=_is_node_state)
            of_nodes += [sharding for x in leaves if _is_node_state(x)]
            shardings.append(sharding)
    of_nodes += [None] * (len(call.nodes) - len(of_nodes))  # Keyword arguments.
    return treedef.unflatten(shardings), of_nodes


def _of_state(told: Any, node: NodeState) -> NodeState:
    """What an `nnx.StateSharding` says of each array of a module."""
    nnx: Any = sys.modules["flax.nnx"]
    if isinstance(node.state, nnx.Variable):
        return NodeState(told.map_prefix((), node.state))
    states = nnx.split_state(node.state, *told.filters)
    states = states if isinstance(states, tuple) else (states,)
    placed = [
        jax.tree.broadcast(sharding, state, is_leaf=lambda x: x is None)
        for sharding, state in zip(told.shardings, states, strict=True)
    ]
    return NodeState(nnx.merge_state(*placed))
