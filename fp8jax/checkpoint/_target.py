"""Whether a folder may be written, asked before any work is done for it."""

import os
import stat
from collections.abc import Iterable, Iterator

# Of a folder's weights, which are written anew; all else in it stays.
WEIGHTS = (".safetensors", ".safetensors.index.json")


def resolved(path: str | os.PathLike) -> str:
    """Where a folder is, or will be: behind symbolic links, the last one too.

    Raises:
        ValueError: If its links lead round in a circle, or it is a mount point, whose
            name cannot be given to another folder.
    """
    real = os.path.realpath(os.fspath(path))
    if os.path.islink(real):
        raise ValueError(f"{os.fspath(path)} is a link that leads to no place.")
    if os.path.ismount(real):
        raise ValueError(
            f"{real} is a mount point, which cannot be replaced as a whole: take a "
            "folder in it."
        )
    return real


def check_old(path: str) -> None:
    """That what lies in a folder, its weights apart, can move to the one after it.

    Raises:
        ValueError: If something in it is neither a file, a folder nor a link.
        PermissionError: If something in it cannot be read.
    """
    for found in _others(path):
        mode = os.lstat(found).st_mode
        if stat.S_ISLNK(mode):
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{found} is no file, folder or link: move it away first.")
        if not os.access(found, os.R_OK):
            raise PermissionError(f"{found} cannot be read, so it would be lost.")


def _others(path: str) -> Iterator[str]:
    for where, folders, files in os.walk(path, onerror=_raise):
        for name in (*folders, *files):
            if where != path or not name.endswith(WEIGHTS):
                yield os.path.join(where, name)


def _raise(error: OSError) -> None:
    raise error


def check_apart(target: str, source: str, files: Iterable[str]) -> None:
    """That replacing the folder `target` deletes nothing of a source.

    Args:
        target: as `resolved` gives it.
        source: the file or folder that is read.
        files: those of its weights.

    Raises:
        ValueError: If `target` is the source's folder, or holds the source or a file
            that it links to.
    """
    if not os.path.isdir(target):
        return
    read = [source, *files]
    if os.path.isdir(source):
        read += [os.path.join(source, name) for name in os.listdir(source)]
    place = os.stat(target)
    for path in map(os.path.realpath, read):
        if any(os.path.samestat(place, os.stat(above)) for above in _upwards(path)):
            raise ValueError(
                f"The result is another folder than the source: {target} in its place "
                f"would delete {path}."
            )


def _upwards(path: str) -> Iterator[str]:
    """A path and the folders around it, those that are there."""
    while True:
        if os.path.exists(path):
            yield path
        above = os.path.dirname(path)
        if above == path:
            return
        path = above
