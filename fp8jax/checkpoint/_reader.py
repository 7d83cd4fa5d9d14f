"""A checkpoint of one file or of many, with weights and their scales paired."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._dtypes import SCALE_DTYPES, scale_to_float32
from fp8jax.checkpoint._error import CheckpointError
from fp8jax.checkpoint._file import SafetensorsFile, Stored
from fp8jax.checkpoint._kinds import (
    Kind,
    configured_tiles,
    kind_of,
    others,
    scale_names,
)

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_DEFAULT_TILE = (128, 128)
_INDEX_SUFFIX = ".index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint, and the scale beside it if its codes are FP8.

    Invariant: `stored` is FP8 if and only if there is a scale. `Reader.scale` gives it
    in shape `ceil(stored.shape / tile)` over the last two dimensions, however it is
    stored: by tiles, or one for each row, column or for the whole matrix.
    """

    name: str
    stored: Stored
    scale_name: str | None = None
    scale: Stored | None = None
    tile: numerics.Tile | None = None
    kind: Kind | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.stored.nbytes + (self.scale.nbytes if self.scale else 0)


class Reader(Mapping[str, Weight]):
    """The tensors of a safetensors file or a folder of them, scales with their weights.

    A mapping from the name of each tensor that is no weight's scale to where it lies.
    Opening reads headers only; `codes` and `scale` give views of the mapped files.

    Args:
        path: a `.safetensors` file; an index (`consolidated.safetensors.index.json`);
            or a folder with `model.safetensors.index.json`, with `model.safetensors`,
            or with one `.safetensors` file.
        tile: of the FP8 weights; by default `weight_block_size` of the folder's
            `config.json`, or `block_structure` or `group_size` of compressed-tensors,
            else 128x128. Scales of rows or whole matrices need none.

    Raises:
        CheckpointError: If a header lies, a shard or a tensor is missing, an FP8 weight
            has no scale, or one of another shape or dtype than its tile asks for.
        OSError: If a file cannot be read.

    Scales are float32, bfloat16, float16, e8m0, or uint8 that hold e8m0's bits; they
    are called as the weight with `_scale_inv`, `_scale` or `_scales_inv` behind, or are
    `scale` or `qscale_weight` beside `weight`, and multiply, whatever their name:
    `x ~= codes * scale`. Weights of other formats (NVFP4, MXFP4, GPTQ, AWQ, int8), with
    what belongs to them, and tensors of dtypes that are unknown here are in `others`
    and not in the mapping; to ask for one is an error.

    Source: DeepSeek-V3's README_WEIGHTS.md, "FP8 Weight Documentation".
    """

    def __init__(
        self, path: str | os.PathLike, *, tile: numerics.Tile | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.config = _read_config(self.path)
        tiles = (tile,) if tile else _configured_tiles(self.path, self.config)
        names = _shards(self.path)
        self._files = {file: SafetensorsFile(file) for file in dict.fromkeys(names[1])}
        self._stored: dict[str, Stored] = {}
        for name, file in zip(*names, strict=True):
            self._add(name, self._files[file])
        self.others: dict[str, str] = others(self._stored) | self._unknown()
        self._weights = _pair(self._stored, self.others, tiles)

    def _unknown(self) -> dict[str, str]:
        """Tensors of dtypes that are unknown here, with what may be their scales."""
        found = {}
        for file in self._files.values():
            for name, code in file.unknown.items():
                beside = (n for n in scale_names(name) if n in self._stored)
                found |= dict.fromkeys((name, *beside), f"dtype {code}")
        return found

    def _add(self, name: str | None, file: SafetensorsFile) -> None:
        if name is None:  # No index: all that the file holds.
            self._stored |= file.tensors
        elif name in file.tensors:
            self._stored[name] = file.tensors[name]
        elif name not in file.unknown:
            raise CheckpointError(
                file.path, f"is not in it, though {INDEX} says so.", name
            )

    def __getitem__(self, name: str) -> Weight:
        if name in self.others:
            raise CheckpointError(
                self.path,
                f"is part of a weight in {self.others[name]}; this library reads FP8 "
                "with scales for tiles, rows or whole matrices, and plain arrays.",
                name,
            )
        return self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the safetensors files, in the order of the index."""
        return tuple(self._files)

    def codes(self, name: str) -> np.ndarray:
        """A tensor as it is stored, a read-only view of the mapped file."""
        return self._files[self[name].stored.path].read(name)

    def take(self, name: str, part: slice) -> np.ndarray:
        """A copy of a part of a tensor's elements, flat, in the order of the file.

        What is taken so is not mapped, and need not be released.

        Raises:
            CheckpointError: If the file has become shorter.
        """
        return self._files[self[name].stored.path].take(name, part)

    def scale(self, name: str) -> np.ndarray:
        """The float32 scales of an FP8 weight; KeyError if `name` is none."""
        weight = self[name]
        if weight.scale is None or weight.scale_name is None:
            raise KeyError(f"{name} is no FP8 weight: it has no scale.")
        stored = self._files[weight.scale.path].read(weight.scale_name)
        assert weight.tile is not None
        found = kind_of(weight.stored.shape, weight.scale.shape, (weight.tile,))
        assert found is not None
        shape = numerics.scale_shape(weight.stored.shape, weight.tile)
        return np.broadcast_to(scale_to_float32(stored.reshape(found[2])), shape)

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages once it is done with, so that memory stays flat.

        Views stay good: touched again, their pages are read again.
        """
        self._files[self[name].stored.path].release(name)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(path, "is no JSON object.")
    return table


def _read_config(path: str) -> dict[str, Any]:
    folder = os.path.dirname(path) if path.endswith(_INDEX_SUFFIX) else path
    config = os.path.join(folder, CONFIG)
    return _read_json(config) if os.path.isfile(config) else {}


def _configured_tiles(path: str, config: dict[str, Any]) -> tuple[numerics.Tile, ...]:
    tiles = []
    for tile in configured_tiles(config):
        sides = tuple(tile) if isinstance(tile, list | tuple) else ()
        if len(sides) != 2 or not all(type(x) is int and x > 0 for x in sides):
            raise CheckpointError(
                os.path.join(path, CONFIG), f"has weight_block_size {tile!r}."
            )
        tiles.append(sides)
    return tuple(tiles) or (_DEFAULT_TILE,)


def _shards(path: str) -> tuple[list[str | None], list[str]]:
    """Names of tensors and the file that each is in; None for all of a file's."""
    if os.path.isfile(path) and path.endswith(_INDEX_SUFFIX):
        return _indexed(os.path.dirname(path), path)
    if os.path.isfile(path):
        return [None], [path]
    index = os.path.join(path, INDEX)
    if os.path.isfile(index):
        return _indexed(path, index)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"No checkpoint at {path}.")
    found = sorted(
        x
        for x in os.listdir(path)
        if x.endswith(".safetensors") and os.path.isfile(os.path.join(path, x))
    )
    if _SINGLE in found:
        found = [_SINGLE]
    if len(found) != 1:
        raise CheckpointError(
            path,
            f"has no {INDEX}, and {len(found)} .safetensors files: one is wanted, or "
            "the path of one of them, or of an index.",
        )
    return [None], [os.path.join(path, found[0])]


def _indexed(path: str, index: str) -> tuple[list[str | None], list[str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(index, "has no weight_map.")
    names: list[str | None] = []
    files = []
    for name, file in weight_map.items():
        # A file elsewhere is no part of this checkpoint.
        if not isinstance(file, str) or file != os.path.basename(file) or not file:
            raise CheckpointError(index, f"is said to be in file {file!r}.", name)
        if not os.path.isfile(os.path.join(path, file)):
            raise CheckpointError(index, f"its shard {file!r} is missing.", name)
        names.append(name)
        files.append(os.path.join(path, file))
    return names, files


def _pair(
    stored: dict[str, Stored],
    others: Mapping[str, str],
    tiles: tuple[numerics.Tile, ...],
) -> dict[str, Weight]:
    weights, scales = {}, set()
    for name, tensor in stored.items():
        if not numerics.is_fp8(tensor.dtype) or name in others:
            continue
        names = scale_names(name)
        scale_name = next((n for n in names if n in stored), None)
        if scale_name is None:
            raise CheckpointError(
                tensor.path,
                f"is {tensor.dtype} and has no scale: none of {', '.join(names)} is "
                "there.",
                name,
            )
        weights[name] = _weight(name, tensor, scale_name, stored[scale_name], tiles)
        scales.add(scale_name)
    return {
        name: weights.get(name, Weight(name, tensor))
        for name, tensor in stored.items()
        if name not in scales and name not in others
    }


def _weight(
    name: str,
    tensor: Stored,
    scale_name: str,
    scale: Stored,
    tiles: tuple[numerics.Tile, ...],
) -> Weight:
    if len(tensor.shape) < 2:
        raise CheckpointError(
            tensor.path, f"is FP8 of shape {tensor.shape}: no matrix.", name
        )
    found = kind_of(tensor.shape, scale.shape, tiles)
    if found is None:
        needed = " or ".join(str(numerics.scale_shape(tensor.shape, t)) for t in tiles)
        raise CheckpointError(
            scale.path,
            f"has shape {scale.shape}; {name!r} {tensor.shape} in tiles of "
            f"{' or '.join(map(str, tiles))} needs {needed}, by rows "
            f"{(*tensor.shape[:-1], 1)}, as a whole (): if it is another, give it.",
            scale_name,
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            scale.path,
            f"is {scale.dtype}; allowed of a scale: "
            f"{', '.join(str(d) for d in SCALE_DTYPES)}.",
            scale_name,
        )
    return Weight(name, tensor, scale_name, scale, found[1], found[0])
