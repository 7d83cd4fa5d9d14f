"""What `config.json` says of FP8 weights, for those who load them by it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._reader import CONFIG

ScaleFormat = Literal["fp32", "ue8m0"]

_FORMATS = dict(zip(numerics.FP8_DTYPES, ("e4m3", "e5m2"), strict=True))


def quantization_config(
    dtype: np.dtype,
    tile: numerics.Tile,
    scale: ScaleFormat,
    modules: Sequence[str],
) -> dict[str, Any]:
    """The `quantization_config` of a model, as DeepSeek-V3's.

    Args:
        dtype: of the codes.
        tile: of every FP8 weight `[out, in]`.
        scale: how scales are stored.
        modules: that are not FP8, as `modules_kept` names them. They are listed twice:
            `modules_to_not_convert` is what transformers reads, `ignored_layers` what
            vLLM does.
    """
    return {
        "quant_method": "fp8",
        "fmt": _FORMATS[np.dtype(dtype)],
        "activation_scheme": "dynamic",
        "weight_block_size": list(tile),
        **({"scale_fmt": "ue8m0"} if scale == "ue8m0" else {}),
        "modules_to_not_convert": list(modules),
        "ignored_layers": list(modules),
    }


def write_config(
    folder: str, config: Mapping[str, Any], quantization: Mapping[str, Any] | None
) -> None:
    """Writes `config.json` with this `quantization_config`, or with none."""
    table = {k: v for k, v in config.items() if k != "quantization_config"}
    if quantization is not None:
        table["quantization_config"] = dict(quantization)
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        json.dump(table, file, indent=2)
