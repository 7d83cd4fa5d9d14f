"""Safetensors files written a piece at a time, at places known beforehand.

The safetensors library writes a file from tensors that are all in memory; quantizing a
model larger than that needs to write one band of rows after another.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from fp8jax.checkpoint._dtypes import TO_CODE
from fp8jax.checkpoint._reader import INDEX

_FLUSH_SECONDS = 0.3

# Shape and dtype of every tensor, in the order that it has in the model.
Specs = Mapping[str, jax.ShapeDtypeStruct]


def nbytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def split_shards(groups: Iterable[Specs], max_bytes: int) -> dict[str, Specs]:
    """Which tensors each file holds, by its name.

    Args:
        groups: tensors that stay in one file: a weight and its scale.
        max_bytes: of a file, unless one group alone is larger.
    """
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    size = 0
    for group in groups:
        more = sum(map(nbytes, group.values()))
        if shards[-1] and size + more > max_bytes:
            shards.append({})
            size = 0
        shards[-1] |= group
        size += more
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"model-{i:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def lost_shards(folder: str, shards: Mapping[str, Specs]) -> set[str]:
    """Those whose files are not in a folder, or have another size."""

    def is_there(name: str, specs: Specs) -> bool:
        try:
            found = os.lstat(os.path.join(folder, name))
        except FileNotFoundError:
            return False
        size = len(_header(specs)[0]) + sum(map(nbytes, specs.values()))
        return stat.S_ISREG(found.st_mode) and found.st_size == size

    return {name for name, specs in shards.items() if not is_there(name, specs)}


class ShardWriter:
    """The files of a checkpoint, of their full size from the start; a context manager.

    What was written goes to the disk while more is computed: little is left for the
    flush of who publishes the files.

    Args:
        folder: where they are made, or are already.
        shards: as `split_shards` gives them.
        anew: those whose files are made; the others' keep what they hold.
        flushing: a context around every flush of all that was written before.
    """

    def __init__(
        self,
        folder: str,
        shards: Mapping[str, Specs],
        *,
        anew: Collection[str] | None = None,
        flushing: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._files: list[int] = []
        self._closing = threading.Event()
        self._flushing = flushing
        self._places: dict[str, tuple[int, int, int]] = {}  # file, start, bytes
        for file_name, specs in shards.items():
            flags = os.O_RDWR | os.O_CREAT
            if anew is None or file_name in anew:
                flags |= os.O_TRUNC
            file = os.open(os.path.join(folder, file_name), flags, 0o666)
            self._files.append(file)
            header, offsets = _header(specs)
            for name, (start, stop) in offsets.items():
                self._places[name] = (file, len(header) + start, stop - start)
            os.ftruncate(file, len(header) + sum(map(nbytes, specs.values())))
            _write_at(file, header, 0)
        if len(shards) > 1:
            _write_index(folder, shards)

    def write(self, name: str, values: np.ndarray, offset: int = 0) -> None:
        """Writes values, from `offset` elements into the tensor `name` on."""
        file, start, size = self._places[name]
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        begin = offset * values.dtype.itemsize
        assert begin + data.size <= size, f"{name}: past its end"
        _write_at(file, data.data, start + begin)

    def __enter__(self) -> "ShardWriter":
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._flushed = self._pool.submit(self._flush_until_closing)
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        self._pool.shutdown()
        for file in self._files:
            os.close(file)
        # A write that failed is told of once: here, not by the flush at the end.
        self._flushed.result()

    def _flush_until_closing(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            with self._flushing():
                for file in self._files:
                    os.fsync(file)


def _header(specs: Specs) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the first tensor, and where each one lies behind them."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # What readers expect.
    offsets, end = {}, 0
    # Wide ones first, so that each lies at a multiple of its item's size.
    by_width = sorted(specs.items(), key=lambda x: -np.dtype(x[1].dtype).itemsize)
    for name, spec in by_width:
        offsets[name] = (end, end + nbytes(spec))
        end += nbytes(spec)
        fields[name] = {
            "dtype": TO_CODE[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": list(offsets[name]),
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write_index(folder: str, shards: Mapping[str, Specs]) -> None:
    weight_map = {name: file for file, specs in shards.items() for name in specs}
    total = sum(nbytes(spec) for specs in shards.values() for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
