"""Two ways to name and turn a model's weights: Hugging Face's and Flax's.

a.0.weight [out, in]   <->  ("a", "0", "kernel") [in, out]
wte.weight [v, d]      <->  ("wte", "embedding") [v, d]
norm.weight [d]        <->  ("norm", "scale") [d]
anything else          <->  the same name and shape
"""

import re
from typing import Literal, get_args

Layout = Literal["hf", "flax"]
Path = tuple[str, ...]

# What is looked up and not multiplied by: its rows are entries of a vocabulary.
EMBEDDING = re.compile(
    r"embed|(^|\.)w[tp]e(\.|$)"
    # T5, BART and RWKV's; `shared` is also a table of layers, elsewhere.
    r"|(^|\.)(shared|emb|relative_attention_bias)(\.(weight|embedding|kernel))?$"
)
_FLAX_LEAVES = ("kernel", "embedding", "scale")


def check_layout(function: str, layout: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(
            f"{function} takes layout {' or '.join(map(repr, get_args(Layout)))}, got "
            f"{layout!r}."
        )


def to_flax(name: str, ndim: int) -> tuple[Path, bool]:
    """The path of a tensor in a Flax tree, and whether it is transposed there.

    Raises:
        ValueError: If its own name is one of Flax's, and would not come back.
    """
    *module, leaf = name.split(".")
    if leaf in _FLAX_LEAVES:
        raise ValueError(
            f"tensor {name!r} is called as Flax's own parameters are: take layout='hf'."
        )
    if leaf != "weight":
        return (*module, leaf), False
    if ndim == 1:
        return (*module, "scale"), False
    if EMBEDDING.search(name):
        return (*module, "embedding"), False
    return ((*module, "kernel"), True) if ndim == 2 else ((*module, leaf), False)


def from_flax(path: Path) -> tuple[str, bool]:
    """Undoes `to_flax`."""
    *module, leaf = path
    transposed = leaf == "kernel"
    return ".".join((*module, "weight" if leaf in _FLAX_LEAVES else leaf)), transposed
