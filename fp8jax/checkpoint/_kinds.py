"""The kinds of scales that FP8 weights are published with, and what is not FP8.

| kind        | a scale of `[..., out, in]`     | tile here  |
| ----------- | ------------------------------- | ---------- |
| tiles       | `[..., out / a, in / b]`, also  | `(a, b)`   |
|             | `[out / a, 1, in / b, 1]`       |            |
| row         | `[..., out, 1]`, `[..., out]`   | (1, 128)   |
| column      | `[..., 1, in]`                  | (128, 1)   |
| tensor      | `[]`, `[1]`, of stacked experts | (128, 128) |
|             | `[experts]`, `[experts, 1, 1]`  |            |

Scales of rows, columns and tensors are repeated over tiles of 128, which is what
products take: the same values, as `codes * scale` is.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._dtypes import E8M0
from fp8jax.checkpoint._file import Stored
from fp8jax.checkpoint._tables import tables

Kind = Literal["tiles", "row", "column", "tensor"]
Shape = tuple[int, ...]

SCALE_SUFFIXES = ("_scale_inv", "_scale", "_scales_inv")
# Beside a `weight`: DeepSeek-V4's, and Mistral's own format's.
_SIBLINGS = ("scale", "qscale_weight")
_WEIGHT = ".weight"
_SIDE = 128
_PACKED_PARTS = ("_scale", "_shape", "_zero_point", "_g_idx", "_global_scale")


def scale_names(name: str) -> list[str]:
    """What the scale of a weight may be called."""
    names = [name + suffix for suffix in SCALE_SUFFIXES]
    if f".{name}".endswith(_WEIGHT):
        names += [name[: -len("weight")] + sibling for sibling in _SIBLINGS]
    return names


def kind_of(
    shape: Shape, scale: Shape, tiles: Iterable[numerics.Tile]
) -> tuple[Kind, numerics.Tile, Shape] | None:
    """How scales are laid over a weight; None if they fit it in no way.

    Args:
        shape: of the weight.
        scale: shape of what is stored.
        tiles: that the scales may be of.

    Returns:
        The kind, the tile, and the shape to read scales in, which is broadcast to
        `numerics.scale_shape(shape, tile)`.
    """
    *batch, m, k = shape
    blocks = scale
    if len(scale) == 4 and len(shape) == 2 and scale[1] == scale[3] == 1:
        blocks = (scale[0], scale[2])  # ModelOpt's
    for tile in tiles:
        if numerics.scale_shape(shape, tile) == blocks:
            return "tiles", tile, blocks
    if scale in ((*batch, m, 1), (*batch, m)):
        return "row", (1, _SIDE), (*batch, m, 1)
    if scale == (*batch, 1, k):
        return "column", (_SIDE, 1), scale
    if math.prod(scale) == 1:
        return "tensor", (_SIDE, _SIDE), (1,) * len(shape)
    if batch and scale in ((*batch,), (*batch, 1), (*batch, 1, 1)):
        return "tensor", (_SIDE, _SIDE), (*batch, 1, 1)
    return None


def configured_tiles(config: Mapping[str, Any]) -> Iterator[Any]:
    """What `config.json` says of tiles, unchecked: DeepSeek's and compressed-tensors'.

    Of multimodal models it is said in `text_config`.
    """
    for table in tables(config):
        for key in ("quantization_config", "compression_config"):
            said = table.get(key)
            if not isinstance(said, Mapping):
                continue
            if said.get("weight_block_size"):
                yield said["weight_block_size"]
            groups = said.get("config_groups")
            for group in groups.values() if isinstance(groups, Mapping) else ():
                weights = group.get("weights") if isinstance(group, Mapping) else None
                if not isinstance(weights, Mapping):
                    continue
                if weights.get("block_structure"):
                    yield weights["block_structure"]
                elif weights.get("strategy") == "group" and weights.get("group_size"):
                    yield [1, weights["group_size"]]


def others(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Tensors that are codes of another format, or belong to such: name to format.

    Source: compressed-tensors' (`weight_packed`), ModelOpt's (uint8 `weight` with FP8
    `weight_scale`), GPTQ's and AWQ's (`qweight`) and gpt-oss' (`_blocks`) names.
    """
    found: dict[str, str] = {}
    for name, tensor in stored.items():
        if name.endswith("_packed"):
            stem = name.removesuffix("_packed")
            parts, scale = ("_packed", *_PACKED_PARTS), stored.get(stem + "_scale")
            fp4 = scale is not None and numerics.is_fp8(scale.dtype)
            kind = "NVFP4" if fp4 else "packed integers"
            names = [stem + part for part in parts]
            names.append(stem.removesuffix("weight") + "input_global_scale")
        elif name.endswith(".qweight"):
            stem, kind = name.removesuffix("qweight"), "GPTQ or AWQ"
            names = [stem + x for x in ("qweight", "qzeros", "scales", "g_idx")]
        elif name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in (
            stored
        ):
            stem, kind = name.removesuffix("_blocks"), "MXFP4"
            names = [name, stem + "_scales"]
        elif tensor.dtype in (np.uint8, np.int8):
            scales = [x for x in scale_names(name) if x in stored]
            if not scales or name.endswith(SCALE_SUFFIXES):
                continue
            dtype = stored[scales[0]].dtype
            kind = "int8"
            if numerics.is_fp8(dtype):
                kind = "NVFP4"
            elif dtype in (E8M0, np.uint8):
                kind = "MXFP4"
            names = [name, *scales, name + "_scale_2", name + "_zero_point"]
            names.append(name.removesuffix("weight") + "input_scale")
        else:
            continue
        found |= {x: kind for x in names if x in stored}
    return found
