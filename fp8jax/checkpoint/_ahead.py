"""Work in pieces that run on threads, one tensor's while the next one's begin.

Invariant: outcomes come in the order of the work, and hold the same bits however many
threads there are.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Generator, Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

# Each thread has a band and what becomes of it in memory, some 10 MB.
_MAX_THREADS = 4


class Work(NamedTuple, Generic[T]):
    """Something to do in pieces.

    Attributes:
        pieces: that may run in any order and at once; each gives the number of bytes
            that it took in.
        finish: runs when all of them have, alone, and gives the outcome.
    """

    pieces: Iterable[Callable[[], int]]
    finish: Callable[[], T]


def run_ahead(
    works: Iterable[Work[T]], progress: Callable[[int], None]
) -> Generator[T]:
    """Runs pieces on every core.

    An exception of a piece is raised in the place of its work's outcome, after those
    of the works before it. However it ends, no piece runs any longer: close it.

    Args:
        works: taken from as threads get free.
        progress: is called by this thread, with what each piece gave.

    Yields:
        The outcome of each, in the order of `works`.
    """
    threads = min(_cores(), _MAX_THREADS)
    queue: collections.deque[concurrent.futures.Future[int] | Callable[[], T]]
    queue = collections.deque()

    def drain(left: int) -> Generator[T]:
        while len(queue) > left:
            first = queue.popleft()
            if isinstance(first, concurrent.futures.Future):
                progress(first.result())
            else:
                yield first()

    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        for work in works:
            for piece in work.pieces:
                queue.append(pool.submit(piece))
                # Enough that no thread waits for the oldest piece to be done with.
                yield from drain(4 * threads)
            queue.append(work.finish)
        yield from drain(0)
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
