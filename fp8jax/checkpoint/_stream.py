"""A checkpoint rewritten tensor by tensor, in bands of rows, and resumed if killed.

Invariant: memory holds some bands, never a model, however large its tensors are.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import shutil
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import numpy as np

from fp8jax import numerics
from fp8jax._version import __version__
from fp8jax.checkpoint import _journal
from fp8jax.checkpoint._ahead import Work, run_ahead
from fp8jax.checkpoint._config import write_config
from fp8jax.checkpoint._lock import held, lock_of
from fp8jax.checkpoint._publish import cleared, publish, take_back
from fp8jax.checkpoint._reader import CONFIG, Reader
from fp8jax.checkpoint._target import WEIGHTS, check_apart, check_old, resolved
from fp8jax.checkpoint._write import (
    ShardWriter,
    Specs,
    lost_shards,
    split_shards,
)

# Half of it takes 7 % more time. A band is in memory once a thread.
_BAND_ELEMENTS = 1 << 20

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a tensor.

    Attributes:
        name: in the file.
        note: why it stayed as it was; empty if it did not.
        bytes_in: that it took, scales included.
        bytes_out: that it takes, scales included.
        sqnr_db: of the codes against what they stand for; None if it stayed.
    """

    name: str
    note: str
    bytes_in: int
    bytes_out: int
    sqnr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor to write: `specs` of what, and `work(reader, writer)` that does it."""

    name: str
    specs: Specs
    work: "functools.partial[Work[Outcome]]"


def rewrite(
    reader: Reader,
    target: str,
    jobs: Sequence[Job],
    quantization: Mapping[str, Any] | None,
    *,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress,
) -> list[Outcome]:
    """Runs `jobs` into a folder that takes the place of `target` at the end.

    A run that was killed leaves its files and a journal beside `target`; the next one
    of the same jobs on the same files goes on behind the last tensor that was finished.

    Raises:
        ValueError: If `target` is there already, unless `overwrite`; if it is, holds or
            links to the source; or if another run is writing it.
    """
    target = resolved(target)
    parent, name = os.path.split(target)
    staging = os.path.join(parent, f".{name}.partial")
    for folder in (target, staging):
        check_apart(folder, reader.path, reader.files)
    os.makedirs(parent, exist_ok=True)
    with held(target):
        # Asked under the lock: a run that ended a moment ago may have made it.
        if os.path.lexists(target):
            if not overwrite or not os.path.isdir(target):
                raise ValueError(
                    f"{target} is there already: remove it, or overwrite it."
                )
            check_old(target)
        outcomes = _written(reader, staging, jobs, max_shard_bytes, progress)
        write_config(staging, reader.config, quantization)
        _copy_others(reader.path, staging, without=(target, staging, lock_of(target)))
        publish(staging, target, without=_journal.NAME)
    return outcomes


def _written(
    reader: Reader,
    staging: str,
    jobs: Sequence[Job],
    max_shard_bytes: int,
    progress: Progress,
) -> list[Outcome]:
    """Runs what of the jobs no earlier run has done; their journal stays."""
    key = _fingerprint(reader, jobs, max_shard_bytes)
    take_back(staging, _journal.NAME)
    lines = _journal.finished(staging, key)
    if lines is None:
        cleared(staging)
    shards = split_shards((job.specs for job in jobs), max_shard_bytes)
    lost = lost_shards(staging, shards)
    gone = {name for shard in lost for name in shards[shard]}
    done = _outcomes(lines or (), {job.name for job in jobs} - gone)
    outcomes = []
    kept = (dataclasses.asdict(outcome) for outcome in done.values())
    with (
        _journal.Journal(staging, key, kept) as log,
        ShardWriter(staging, shards, anew=lost, flushing=log.marking) as writer,
    ):
        works = (_work(job, done, reader, writer) for job in jobs)
        # Closed before the files are: a piece may be writing yet.
        with contextlib.closing(run_ahead(works, progress)) as running:
            for outcome in running:
                if outcome.name not in done:
                    log.add(dataclasses.asdict(outcome))
                outcomes.append(outcome)
    return outcomes


def _work(
    job: Job, done: Mapping[str, Outcome], reader: Reader, writer: ShardWriter
) -> Work[Outcome]:
    if job.name not in done:
        return job.work(reader, writer)
    nbytes = reader[job.name].nbytes
    return Work([lambda: nbytes], lambda: done[job.name])


def _fingerprint(reader: Reader, jobs: Sequence[Job], max_shard_bytes: int) -> str:
    """What must be the same for a run to go on where another stopped."""
    files = [
        (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
        for path in map(os.path.abspath, reader.files)
    ]
    specs = [[(n, str(s)) for n, s in job.specs.items()] for job in jobs]
    rules = [job.work.keywords for job in jobs]
    text = repr((__version__, files, specs, rules, max_shard_bytes))
    return hashlib.sha256(text.encode()).hexdigest()


def _outcomes(
    lines: Iterable[Mapping[str, Any]], wanted: Collection[str]
) -> dict[str, Outcome]:
    """Those of tensors that are wanted; a damaged line costs its tensor."""
    found = {}
    for line in lines:
        with contextlib.suppress(TypeError):  # Other fields than an Outcome's.
            outcome = Outcome(**line)
            if outcome.name in wanted:
                found[outcome.name] = outcome
    return found


def _copy_others(source: str, target: str, without: Collection[str]) -> None:
    """The tokenizer, subfolders and what else lies beside the weights."""
    if not os.path.isdir(source):
        return
    places = [os.stat(path) for path in without if os.path.exists(path)]

    def unwanted(where: str, names: list[str]) -> list[str]:
        paths = {name: os.path.join(where, name) for name in names}
        return [name for name, path in paths.items() if not wanted(path)]

    def wanted(path: str) -> bool:
        if not (os.path.isdir(path) or os.path.isfile(path)):
            return False  # A pipe, or a link to nothing.
        return not any(os.path.samestat(os.stat(path), place) for place in places)

    for name in os.listdir(source):
        path, copy = os.path.join(source, name), os.path.join(target, name)
        if name.endswith(WEIGHTS) or name == CONFIG or not wanted(path):
            continue
        if os.path.isdir(path):
            shutil.copytree(path, copy, ignore=unwanted, dirs_exist_ok=True)
        else:
            shutil.copy2(path, copy)


def bands(shape: tuple[int, ...], tile: numerics.Tile) -> Iterator[tuple[int, slice]]:
    """Pieces of an array `[..., m, k]`: which matrix, and which whole rows of tiles."""
    *batch, m, k = shape
    if not k:
        return
    rows = max(1, _BAND_ELEMENTS // (k * tile[0])) * tile[0]
    for matrix in range(int(np.prod(batch, dtype=np.int64))):
        for start in range(0, m, rows):
            yield matrix, slice(start, min(start + rows, m))


def copy_work(
    reader: Reader, writer: ShardWriter, *, name: str, note: str
) -> Work[Outcome]:
    """Writes a tensor as it is."""
    stored = reader[name].stored

    def run(start: int) -> int:
        values = reader.take(name, slice(start, start + _BAND_ELEMENTS))
        writer.write(name, values, start)
        return values.nbytes

    starts = range(0, math.prod(stored.shape), _BAND_ELEMENTS)
    outcome = Outcome(name, note, stored.nbytes, stored.nbytes)
    return Work((functools.partial(run, s) for s in starts), lambda: outcome)
