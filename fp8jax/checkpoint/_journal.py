"""What a run has finished, for the next one to go on behind.

A line is written as soon as its tensor is: a process that is killed loses the tensor in
hand. If the machine itself stops, the disk may have a line and not the tensor's bytes;
then lines count up to the last mark, which is written once the bytes are on the disk.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

NAME = "progress.jsonl"
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
_MARK = "synced"  # How many of the lines before are of bytes on the disk.
_Line = dict[str, Any]


class Journal:
    """Lines that are appended; a context manager.

    Args:
        folder: of the files that it is about, where it lies.
        key: of what the run does.
        finished: what an earlier run of the key had finished, kept.
    """

    def __init__(self, folder: str, key: str, finished: Iterable[_Line]) -> None:
        path = os.path.join(folder, NAME)
        self._lock = threading.Lock()
        kept = list(finished)
        self._count, self._marked = len(kept), 0
        new = f"{path}.new"  # The old one stays whole until this one is.
        with open(new, "w", encoding="utf-8") as file:
            for line in (_head(folder, key), *kept):
                print(json.dumps(line), file=file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)

    def add(self, line: _Line) -> None:
        """A tensor whose bytes have been written."""
        with self._lock:
            self._append(line)
            self._count += 1

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """What was written before is on the disk where this ends well."""
        with self._lock:
            count = self._count
        yield
        if count > self._marked:
            with self._lock:
                self._append({_MARK: count})
            os.fsync(self._file)
            self._marked = count

    def _append(self, line: _Line) -> None:
        data = (json.dumps(line) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]


def finished(folder: str, key: str) -> list[_Line] | None:
    """The lines of a run of this key in this folder; None if there was none.

    Without those that are damaged.
    """
    try:
        path = os.path.join(folder, NAME)
        with open(path, encoding="utf-8", errors="replace") as file:
            head, *lines = map(_parsed, file.read().split("\n"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    now = _head(folder, key)
    if {**head, "boot": ""} != {**now, "boot": ""}:
        return None
    tensors = [line for line in lines if _MARK not in line]
    if not now["boot"] or head["boot"] != now["boot"]:
        marks = [line[_MARK] for line in lines if isinstance(line.get(_MARK), int)]
        tensors = tensors[: max(marks, default=0)]
    return [line for line in tensors if line]


def _head(folder: str, key: str) -> _Line:
    """The folder's own number, too: files that take its place are no files of it."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"key": key, "folder": os.stat(folder).st_ino, "boot": boot}


def _parsed(line: str) -> _Line:
    try:
        found = json.loads(line)
    except ValueError:  # Cut short, or damaged.
        return {}
    return found if isinstance(found, dict) else {}
