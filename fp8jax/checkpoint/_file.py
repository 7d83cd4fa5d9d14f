"""One safetensors file: a checked header over memory-mapped bytes.

The format: eight bytes of little-endian header size, the header in JSON (name to dtype,
shape and byte range), the tensors one after another with neither gap nor overlap.
Source: https://huggingface.co/docs/safetensors, "Format". Read here and not by the
safetensors library, which up to 0.8 cannot give NumPy its float8 tensors.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import re
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from fp8jax.checkpoint._dtypes import FROM_CODE
from fp8jax.checkpoint._error import CheckpointError

_MAX_HEADER = 100_000_000  # The format's own limit.
_CODE = re.compile(r"[A-Z][A-Z0-9_]*")  # Of a dtype, known here or not.
_MAX_RANK = 64  # NumPy's.
_MAX_SIDE = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_JAX_ALIGNMENT = 64  # Bytes, of the arrays that XLA:CPU takes without copying them.


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `start` to `stop` of the file at `path`."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """A file whose header was checked against its size; tensors are views of it.

    It is open while it is read and while views of it live: a model of many files takes
    no more of what a process may have open.

    Attributes:
        metadata: of the header.
        tensors: where each lies.
        unknown: the dtype codes of those whose dtype is unknown here, by name.

    Args:
        path: of a `.safetensors` file.

    Raises:
        CheckpointError: If the header is not what the format asks for, or names bytes
            that are not there, overlap, or belong to no tensor.
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            self._identity = os.fstat(file.fileno())
            header = _read_header(self.path, file, self._identity.st_size)
        self._map: weakref.ref[mmap.mmap] | None = None
        self.metadata: dict[str, str] = header.metadata
        self.tensors: dict[str, Stored] = header.tensors
        self.unknown: dict[str, str] = header.unknown

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file that the header is of, or an error."""
        file = os.open(self.path, os.O_RDONLY)
        try:
            now = os.fstat(file)
            if not os.path.samestat(now, self._identity):
                raise CheckpointError(self.path, "is another file than it was.")
            yield file
        finally:
            os.close(file)

    def _mapped(self) -> mmap.mmap:
        """The file's bytes, mapped once for all views that live."""
        found = self._map() if self._map is not None else None
        if found is None:
            with self._opened() as file:
                found = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            self._map = weakref.ref(found)
        return found

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor; pages are loaded as they are touched."""
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        if count == 0:
            return np.empty(stored.shape, stored.dtype)
        bytes_ = self._mapped()
        if len(bytes_) < stored.stop:
            raise CheckpointError(self.path, "was cut short meanwhile.", name)
        flat = np.frombuffer(bytes_, np.uint8, stored.nbytes, stored.start)
        return flat.view(stored.dtype).reshape(stored.shape)

    def take(self, name: str, part: slice) -> np.ndarray:
        """A copy of elements of a tensor in the file's order; no page of it is mapped.

        It begins where XLA:CPU takes an array as it is: `jax.device_put` need not copy.

        Raises:
            CheckpointError: If the file has become shorter.
        """
        stored = self.tensors[name]
        begin, end, _ = part.indices(math.prod(stored.shape))
        begin, end = (i * stored.dtype.itemsize for i in (begin, end))
        room = np.empty(end - begin + _JAX_ALIGNMENT, np.uint8)
        first = -room.ctypes.data % _JAX_ALIGNMENT
        copy = room[first : first + end - begin]
        done = 0
        with self._opened() as file:
            while done < copy.size:
                at = stored.start + begin + done
                got = os.preadv(file, [copy[done:].data], at)
                if not got:
                    raise CheckpointError(self.path, "was cut short meanwhile.", name)
                done += got
        return copy.view(stored.dtype)

    def release(self, name: str) -> None:
        """Lets go of the pages of a tensor; they count as this process's memory."""
        stored = self.tensors[name]
        found = self._map() if self._map is not None else None
        first = stored.start - stored.start % mmap.PAGESIZE
        if found is not None and stored.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            found.madvise(mmap.MADV_DONTNEED, first, stored.stop - first)


@dataclasses.dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    tensors: dict[str, Stored]
    unknown: dict[str, str]


def _read_header(path: str, file: Any, size: int) -> _Header:
    if size < 8:
        raise CheckpointError(path, f"no safetensors file: it has {size} bytes.")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            path,
            f"its header is said to have {length} bytes; the file has {size - 8} after "
            f"the size, and {_MAX_HEADER} are allowed.",
        )
    fields = _parse(path, file.read(length))
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(path, "__metadata__ is no table of strings.")
    begin = 8 + length
    found = {name: _stored(path, name, entry, begin) for name, entry in fields.items()}
    _check_cover(path, found, begin, size)
    unknown = {
        name: fields[name]["dtype"] for name in found if not _is_known(fields[name])
    }
    tensors = {name: stored for name, stored in found.items() if name not in unknown}
    return _Header(metadata, tensors, unknown)


def _parse(path: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise CheckpointError(path, "is in the header twice.", name)
            table[name] = value
        return table

    try:
        decoded = text.decode()
        decoded.encode()
        fields = json.loads(decoded, object_pairs_hook=unique)
        json.dumps(fields, ensure_ascii=False).encode()  # No lone surrogates.
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its header is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(path, "its header is no JSON object.")
    return fields


def _stored(path: str, name: str, entry: Any, begin: int) -> Stored:
    # The format may get more fields.
    if not isinstance(entry, dict) or not set(entry) >= _FIELDS:
        raise CheckpointError(
            path, f"its entry has other fields than {sorted(_FIELDS)}.", name
        )
    if not isinstance(entry["dtype"], str) or not _CODE.fullmatch(entry["dtype"]):
        raise CheckpointError(path, f"has dtype {entry['dtype']!r}, no name.", name)
    shape = entry["shape"]
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(path, f"has shape {_brief(shape)}.", name)
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(path, f"has data_offsets {_brief(offsets)}.", name)
    place = begin + offsets[0], begin + offsets[1]
    if not _is_known(entry):  # How many bytes it takes is unknown, too.
        return Stored(path, np.dtype(np.void), tuple(shape), *place)
    dtype = FROM_CODE[entry["dtype"]]
    # Python's integers: a product of lying sides cannot wrap around.
    needed = math.prod(shape) * dtype.itemsize
    if math.prod(side for side in shape if side) * dtype.itemsize > _MAX_SIDE:
        raise CheckpointError(path, f"has shape {_brief(shape)}.", name)
    if needed != offsets[1] - offsets[0]:
        raise CheckpointError(
            path,
            f"{entry['dtype']}{_brief(shape)} needs {needed} bytes, its data_offsets "
            f"{_brief(offsets)} hold {offsets[1] - offsets[0]}.",
            name,
        )
    return Stored(path, dtype, tuple(shape), *place)


def _is_known(entry: dict[str, Any]) -> bool:
    return entry["dtype"] in FROM_CODE


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_SIDE for value in values
    )


def _brief(values: Any) -> str:
    text = str(values)
    return text if len(text) < 80 else text[:77] + "..."


def _check_cover(path: str, tensors: dict[str, Stored], begin: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end, before = begin, None
    for name, stored in sorted(tensors.items(), key=lambda x: (x[1].start, x[1].stop)):
        if stored.stop > size:
            raise CheckpointError(
                path,
                f"ends at byte {stored.stop} of a file of {size}: it was cut short.",
                name,
            )
        if stored.start < end:
            raise CheckpointError(path, f"overlaps with tensor {before!r}.", name)
        if stored.start > end:
            raise CheckpointError(
                path, f"{stored.start - end} bytes before it are no tensor's.", name
            )
        end, before = stored.stop, name
    if end != size:
        raise CheckpointError(path, f"its last {size - end} bytes are no tensor's.")
