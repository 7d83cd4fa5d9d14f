"""Functions that update NNX modules in place, as pure functions and back.

Flax is never imported here: where it is not, there are no modules either.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fp8jax.transform._arguments import Static
from fp8jax.transform._leaves import Leaf, leaves_of


def has_graph_nodes(tree: Any) -> bool:
    """Whether some node of a pytree is an NNX module, optimizer, or the like."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_graph_node)
    return any(map(_is_graph_node, nodes))


def _is_graph_node(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, (nnx.Pytree, nnx.Module))


@dataclasses.dataclass(frozen=True)
class PureFunction:
    """An NNX function of arrays: `(graphdef, state, rest) -> (output, new state)`.

    Attributes:
        fn: the function; it may update its arguments.
        names: of all its positional arguments.
        nodes: names of the arguments that hold modules.
    """

    fn: Callable[..., Any]
    names: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return getattr(self.fn, "__name__", "fp8_transform")

    def split(
        self, arguments: dict[str, Any], static: frozenset[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """What to call this with, of the arguments by name."""
        nnx: Any = sys.modules["flax.nnx"]
        graphdef, state = nnx.split(tuple(arguments[name] for name in self.nodes))
        rest = {
            name: Static(x) if name in static else x
            for name, x in arguments.items()
            if name not in self.nodes
        }
        return graphdef, state, rest

    def __call__(
        self, graphdef: Any, state: Any, rest: dict[str, Any]
    ) -> tuple[Any, Any]:
        nnx: Any = sys.modules["flax.nnx"]
        nodes = nnx.merge(graphdef, state)
        by_name = {**rest, **dict(zip(self.nodes, nodes, strict=True))}
        args = [by_name.pop(name) for name in self.names]
        output = self.fn(*args, **by_name)
        new_graphdef, new_state = nnx.split(nodes)
        if new_graphdef != graphdef:
            raise ValueError(
                f"fp8_transform({self.__name__}): the function changed the structure "
                f"of its NNX arguments {self.nodes}, which cannot be carried over. Use "
                "nnx.split outside and nnx.merge inside of the function."
            )
        return output, new_state

    def update(self, arguments: dict[str, Any], state: Any) -> None:
        """Puts a new state into the arguments, in place."""
        nnx: Any = sys.modules["flax.nnx"]
        nnx.update(tuple(arguments[name] for name in self.nodes), state)

    def leaves(self, args: Sequence[Any], kwargs: Any) -> list[Leaf]:
        """The leaves of this function's arguments, named as those of `fn`."""
        _, state, rest = args
        numbers = {name: i for i, name in enumerate(self.names)}
        found = []
        for leaf in leaves_of(["state"], [state], {}):
            node, *keys = leaf.keys
            name = self.nodes[int(node)]
            found.append(dataclasses.replace(leaf, argument=name, keys=tuple(keys)))
        found += leaves_of([], [], rest)
        return [
            dataclasses.replace(leaf, number=numbers.get(leaf.argument))
            for leaf in found
        ]
