"""A checkpoint of one file or of many, with weights and their scales paired."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._dtypes import FROM_CODE, SCALE_DTYPES, scale_to_float32
from fp8jax.checkpoint._error import CheckpointError
from fp8jax.checkpoint._file import SafetensorsFile, Stored
from fp8jax.checkpoint._schemes import Scheme, in_tiles, scheme_of

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SCALE_SUFFIXES = ("_scale_inv", "_scale", "_scales_inv")
# In the place of `weight`: DeepSeek-V4's, and Mistral's own files.
_OTHER_NAMES = ("scale", "qscale_weight")

_DEFAULT_TILE = (128, 128)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint, and the scale beside it if its codes are FP8.

    Invariant: `stored` is FP8 if and only if there is a scale, which stands for one of
    each tile (`scheme`).
    """

    name: str
    stored: Stored
    scale_name: str | None = None
    scale: Stored | None = None
    tile: numerics.Tile | None = None
    scheme: Scheme = "blocks"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.stored.nbytes + (self.scale.nbytes if self.scale else 0)


class Reader(Mapping[str, Weight]):
    """The tensors of a safetensors file or a folder of them, scales with their weights.

    A mapping from the name of each tensor that is no weight's scale to where it lies.
    Opening reads headers only; `codes` and `scale` give views of the mapped files.
    Tensors whose dtype is unknown here are no items of it: `unknown` has their dtypes'
    codes by name, and to ask for one is an error.

    Args:
        path: a `.safetensors` file, or a folder with `model.safetensors.index.json` or
            with one `.safetensors` file.
        tile: of FP8 weights with a scale for each block; by default what the folder's
            `config.json` says (`weight_block_size`, or `block_structure` of
            compressed-tensors, also in `text_config`), else 128x128.

    Raises:
        CheckpointError: If a header lies, a shard or a tensor is missing, an FP8 weight
            has no scale, or one of another shape or dtype than its tile asks for.
        OSError: If a file cannot be read.

    Scales are float32, bfloat16, float16, e8m0, or uint8 that hold e8m0's bits; they
    are called as the weight with `_scale_inv`, `_scale` or `_scales_inv` behind, or as
    its module with `.scale` or `.qscale_weight`, and multiply, whatever their name:
    `x ~= codes * scale`. They are of blocks, of output channels or of whole matrices.

    Source: DeepSeek-V3's README_WEIGHTS.md, "FP8 Weight Documentation".
    """

    def __init__(
        self, path: str | os.PathLike, *, tile: numerics.Tile | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.config = _read_config(self.path)
        self.tile = tile or _configured_tile(self.path, self.config)
        names = _shards(self.path)
        self._files = {file: SafetensorsFile(file) for file in dict.fromkeys(names[1])}
        self._stored: dict[str, Stored] = {}
        self.unknown: dict[str, str] = {}
        for name, file in zip(*names, strict=True):
            self._add(name, self._files[file])
        self._weights = _pair(self._stored, self.tile)

    def _add(self, name: str | None, file: SafetensorsFile) -> None:
        if name is None:  # No index: all that the file holds.
            self._stored |= file.tensors
            self.unknown |= file.unknown
        elif name in file.unknown:
            self.unknown[name] = file.unknown[name]
        elif name in file.tensors:
            self._stored[name] = file.tensors[name]
        else:
            raise CheckpointError(
                file.path, f"is not in it, though {INDEX} says so.", name
            )

    def __getitem__(self, name: str) -> Weight:
        if name in self.unknown:
            self.check_known([name])
        return self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def check_known(self, names: Iterable[str] | None = None) -> None:
        """That tensors, by default all, have dtypes that are known here.

        Raises:
            CheckpointError: If one has another.
        """
        for name in self.unknown if names is None else names:
            if name in self.unknown:
                raise CheckpointError(
                    self.path,
                    f"has dtype {self.unknown[name]!r}; known are "
                    f"{', '.join(FROM_CODE)}.",
                    name,
                )

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
        """The float32 scales of an FP8 weight's tiles; KeyError if `name` is none."""
        weight = self[name]
        if weight.scale is None or weight.scale_name is None or weight.tile is None:
            raise KeyError(f"{name} is no FP8 weight: it has no scale.")
        stored = self._files[weight.scale.path].read(weight.scale_name)
        scale = scale_to_float32(stored)
        return in_tiles(scale, weight.scheme, weight.stored.shape, weight.tile)

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
    config = os.path.join(path, CONFIG)
    return _read_json(config) if os.path.isfile(config) else {}


def _configured_tile(path: str, config: dict[str, Any]) -> numerics.Tile:
    found = (
        tile for table in (config, config.get("text_config")) for tile in _tiles(table)
    )
    tile = next(found, _DEFAULT_TILE)
    sides = tuple(tile) if isinstance(tile, list | tuple) else ()
    if len(sides) != 2 or not all(type(x) is int and x > 0 for x in sides):
        raise CheckpointError(
            os.path.join(path, CONFIG), f"has weight_block_size {tile!r}."
        )
    return sides


def _tiles(config: Any) -> Iterator[Any]:
    """What a table of a config says of blocks, if anything."""
    quantization = (
        config.get("quantization_config") if isinstance(config, dict) else None
    )
    if not isinstance(quantization, dict):
        return
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    blocks = [w.get("block_structure") for w in weights if isinstance(w, dict)]
    yield from filter(None, (quantization.get("weight_block_size"), *blocks))


def _shards(path: str) -> tuple[list[str | None], list[str]]:
    """Names of tensors and the file that each is in; None for all of a file's."""
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
    if len(found) != 1:
        raise CheckpointError(
            path, f"has no {INDEX}, and {len(found)} .safetensors files: one is wanted."
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


def _pair(stored: dict[str, Stored], tile: numerics.Tile) -> dict[str, Weight]:
    weights, scales = {}, set()
    for name, tensor in stored.items():
        if not numerics.is_fp8(tensor.dtype):
            continue
        names = [name + suffix for suffix in SCALE_SUFFIXES]
        if name.endswith(".weight"):
            names += [name.removesuffix("weight") + other for other in _OTHER_NAMES]
        scale_name = next((n for n in names if n in stored), None)
        if scale_name is None:
            raise CheckpointError(
                tensor.path,
                f"is {tensor.dtype} and has no scale: none of {', '.join(names)} is "
                "there.",
                name,
            )
        scale = stored[scale_name]
        scheme, of_tiles = _scheme(name, tensor, scale_name, scale, tile)
        weights[name] = Weight(name, tensor, scale_name, scale, of_tiles, scheme)
        scales.add(scale_name)
    return {
        name: weights.get(name, Weight(name, tensor))
        for name, tensor in stored.items()
        if name not in scales
    }


def _scheme(
    name: str, tensor: Stored, scale_name: str, scale: Stored, tile: numerics.Tile
) -> tuple[Scheme, numerics.Tile]:
    if len(tensor.shape) < 2:
        raise CheckpointError(
            tensor.path, f"is FP8 of shape {tensor.shape}: no matrix.", name
        )
    found = scheme_of(tensor.shape, scale.shape, tile)
    if found is None:
        expected = numerics.scale_shape(tensor.shape, tile)
        raise CheckpointError(
            scale.path,
            f"has shape {scale.shape}; {name!r} {tensor.shape} in tiles of {tile} "
            f"needs {expected}, one scale per output channel "
            f"{(*tensor.shape[:-1], 1)}, one per matrix {tensor.shape[:-2]}. Other "
            "tiles are those of config.json, or of `tile=`.",
            scale_name,
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            scale.path,
            f"is {scale.dtype}; allowed of a scale: "
            f"{', '.join(str(d) for d in SCALE_DTYPES)}.",
            scale_name,
        )
    return found
