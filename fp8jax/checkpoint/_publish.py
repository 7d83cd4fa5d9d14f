"""A folder that takes another's place at once: a reader sees one or the other."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator

from fp8jax.checkpoint._lock import held
from fp8jax.checkpoint._target import WEIGHTS, check_old, resolved

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replaced_folder(path: str) -> Iterator[str]:
    """An empty folder to fill, which becomes `path` when the context ends well.

    Files of an earlier folder at `path` that are no part of a checkpoint's weights and
    are not there anew (a tokenizer, say) move along. Killed or raising before the end,
    the old folder stays whole; what was begun lies beside it until the next save. A
    link stays, and the folder that it leads to is replaced.

    Raises:
        ValueError: If `path` is a file or a mount point, or what lies in it cannot move
            along; or if another save or run is writing it.
    """
    path = resolved(path)
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise ValueError(f"A checkpoint is saved to a folder, got the file {path}.")
        check_old(path)
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    staging = os.path.join(parent, f".{name}.saving")
    with held(path):
        cleared(staging)
        try:
            yield staging
            publish(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def cleared(folder: str) -> None:
    """Makes an empty folder, and removes whatever an earlier run left there."""
    if os.path.islink(folder) or os.path.isfile(folder):
        os.remove(folder)
    elif os.path.isdir(folder):
        shutil.rmtree(folder)
    os.mkdir(folder)


def publish(staging: str, path: str, *, without: str | None = None) -> None:
    """Puts the folder `staging` in the place of `path`; what was there is deleted.

    Args:
        staging: on the file system of `path`.
        path: as `resolved` gives it.
        without: a file of `staging` that lies beside it meanwhile and is deleted in the
            end; killed before that, `take_back` has it back.
    """
    if os.path.isdir(path):
        _keep_others(path, staging)
    _flush(staging)
    if without is not None:
        os.replace(os.path.join(staging, without), _aside(staging))
    if not os.path.isdir(path):
        os.rename(staging, path)
    else:
        _exchange(staging, path)
        shutil.rmtree(staging)
    if without is not None:
        os.remove(_aside(staging))
    _flush_folder(os.path.dirname(path))


def take_back(staging: str, name: str) -> None:
    """Undoes what a `publish` that was killed has done of its `without`."""
    aside, place = _aside(staging), os.path.join(staging, name)
    if os.path.isfile(aside):
        if os.path.isdir(staging) and not os.path.lexists(place):
            os.replace(aside, place)
        else:
            os.remove(aside)


def _aside(staging: str) -> str:
    return f"{staging}.journal"


def _keep_others(old: str, new: str) -> None:
    for name in os.listdir(old):
        source, target = os.path.join(old, name), os.path.join(new, name)
        if name.endswith(WEIGHTS) or os.path.lexists(target):
            continue
        if os.path.isdir(source) and not os.path.islink(source):
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _flush(folder: str) -> None:
    for where, _, files in os.walk(folder):
        for path in (os.path.join(where, name) for name in files):
            if os.path.islink(path):  # What it leads to is not ours.
                continue
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        _flush_folder(where)


def _flush_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _exchange(a: str, b: str) -> None:
    """Swaps two folders' names; in one step where the system has one (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        rename = None
    if rename is not None:
        names = os.fsencode(a), os.fsencode(b)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), b)
    # NOTE: killed between these two, the old files are whole under the name `aside`.
    aside = f"{b}.old"
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
