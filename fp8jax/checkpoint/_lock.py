"""One writer of a folder at a time."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # No POSIX: nothing here keeps two runs apart.
    fcntl = None


@contextlib.contextmanager
def held(target: str) -> Iterator[None]:
    """The lock of who writes `target`, a file beside it that the process holds open.

    The system drops it with the process, however that ends: a lock file that was left
    behind is nobody's. Among machines it holds where `flock` does (NFS 4 and most
    cluster file systems); elsewhere runs on one machine alone are kept apart.

    Raises:
        ValueError: If another run holds it.
        OSError: If the folder around `target` cannot be written to.
    """
    if fcntl is None:
        yield
        return
    path = lock_of(target)
    file = _locked(path, target)
    try:
        yield
    finally:
        # While the lock is held: whoever opened the file before sees that it is gone.
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        os.close(file)


def lock_of(target: str) -> str:
    """Where the lock file of a folder is."""
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.lock")


def _locked(path: str, target: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file):
                return file
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"Another run is writing {target}: wait for its end, or choose another "
                f"folder (it holds {path})."
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # Its holder removed it between the two calls: begin anew.


def _is_still(path: str, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
