"""Whether a checkpoint is quantized already, and whether all of it can be read."""

import os
from collections.abc import Mapping

from fp8jax.checkpoint._reader import Reader
from fp8jax.checkpoint._tables import tables

# Beside config.json, which has no entry then.
_SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}


def whole(function: str, reader: Reader) -> None:
    """That every tensor is read: one that is not would be lost.

    Raises:
        ValueError: If a tensor is of another format.
    """
    for name, kind in reader.others.items():
        raise ValueError(
            f"{function} takes FP8 weights and plain arrays, got {name!r} of {kind} in "
            f"{reader.path}, one of {len(reader.others)} such tensors."
        )


def check_unquantized(reader: Reader) -> None:
    """That there is something to quantize.

    Raises:
        ValueError: If a weight is FP8, or a config says that weights are quantized.
    """
    for name, weight in reader.items():
        if weight.scale is not None:
            raise ValueError(
                f"quantize_checkpoint takes weights that are not FP8 yet, got {name!r} "
                f"in {weight.stored.path}."
            )
    method = _method(reader)
    if method:
        raise ValueError(
            f"quantize_checkpoint takes weights that are not quantized yet, and "
            f"{reader.path} is by {method!r}."
        )


def _method(reader: Reader) -> str:
    """What quantized a checkpoint, by its configs; empty if they do not say."""
    for table in tables(reader.config):
        found = table.get("quantization_config")
        if found:
            named = found.get("quant_method") if isinstance(found, Mapping) else None
            return str(named or "an unnamed method")
    for file, method in _SIDE_FILES.items():
        if os.path.isfile(os.path.join(reader.path, file)):
            return method
    return ""
