"""What of Equinox's conventions a call has to keep: numbers in modules are no arrays.

A module's fields are leaves, Python numbers among them, such as a dropout's rate or
whether it is off. Equinox's own `filter_*` functions leave those as they are.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax


def is_of_equinox(fn: Callable[..., Any]) -> bool:
    """Whether a function is one of Equinox's own, such as a `filter_pmap` of yours."""
    return type(fn).__module__.split(".")[0] == "equinox"


def in_modules(tree: Any) -> frozenset[int]:
    """Indices of the leaves that are in an Equinox module."""
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return frozenset()
    found, count = set(), 0
    for part in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, equinox.Module)):
        after = count + len(jax.tree.leaves(part))
        if isinstance(part, equinox.Module):
            found.update(range(count, after))
        count = after
    return frozenset(found)
