"""What came, for messages: a tree of arrays by their types, not by their numbers."""

from typing import Any

import jax

_LONGEST = 160


def described(x: Any) -> str:
    """A value's `repr`, short: arrays in it as `float32[256,256]`."""

    def brief(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        return _Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    try:
        text = repr(jax.tree.map(brief, x))
    except Exception:  # A node that takes arrays only.
        text = f"a {type(x).__name__}"
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({type(x).__name__})"
    return text


class _Text:
    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text
