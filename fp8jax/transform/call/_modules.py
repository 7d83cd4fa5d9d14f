"""Which values are NNX modules; without Flax, none is."""

import sys
from typing import Any

import jax


def has_modules(tree: Any) -> bool:
    """Whether a pytree holds an NNX module, optimizer, or variable of its own."""
    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module_or_state)))


def is_module(x: Any) -> bool:
    """Whether it is an NNX module, optimizer or variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, (nnx.Pytree, nnx.Module, nnx.Variable))


def is_module_or_state(x: Any) -> bool:
    """Whether NNX knows what is in it."""
    # Variables in a State are values: it came out of nnx.split.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and (is_module(x) or isinstance(x, nnx.State))
