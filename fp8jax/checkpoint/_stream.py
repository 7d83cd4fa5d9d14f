"""A checkpoint rewritten tensor by tensor, in bands of rows, and resumed if killed.

Invariant: memory holds some bands, never a model, however large its tensors are.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fp8jax import numerics
from fp8jax.checkpoint._ahead import Work, run_ahead
from fp8jax.checkpoint._config import write_config
from fp8jax.checkpoint._publish import publish
from fp8jax.checkpoint._reader import CONFIG, Reader
from fp8jax.checkpoint._write import ShardWriter, Specs, split_shards

# Half of it takes 7 % more time. A band is in memory once a thread.
_BAND_ELEMENTS = 1 << 20
_JOURNAL = "progress.jsonl"

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
        ValueError: If `target` is there already, unless `overwrite`, or is the source.
    """
    target = os.path.abspath(target)
    if os.path.exists(target):
        if os.path.samefile(target, reader.path):
            raise ValueError(f"The result is another folder than the source {target}.")
        if not overwrite or not os.path.isdir(target):
            raise ValueError(f"{target} is there already: remove it, or overwrite it.")
    parent, name = os.path.split(target)
    staging = os.path.join(parent, f".{name}.partial")
    os.makedirs(staging, exist_ok=True)
    journal = os.path.join(staging, _JOURNAL)
    key = _fingerprint(reader, jobs, max_shard_bytes)
    done = _finished(journal, key)
    if done is None:
        shutil.rmtree(staging)
        os.mkdir(staging)
    shards = split_shards((job.specs for job in jobs), max_shard_bytes)
    outcomes = []
    with (
        ShardWriter(staging, shards, resume=done is not None) as writer,
        open(journal, "w", encoding="utf-8") as log,  # Its last line may be cut short.
    ):
        print(json.dumps(key), file=log)
        works = (_work(job, done or {}, reader, writer) for job in jobs)
        # Closed before the files are: a piece may be writing yet.
        with contextlib.closing(run_ahead(works, progress)) as running:
            for outcome in running:
                print(json.dumps(dataclasses.asdict(outcome)), file=log, flush=True)
                outcomes.append(outcome)
    os.remove(journal)
    write_config(staging, reader.config, quantization)
    _copy_others(reader.path, staging)
    publish(staging, target)
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
    text = repr((files, specs, rules, max_shard_bytes))
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(journal: str, key: str) -> dict[str, Outcome] | None:
    """The tensors of a run of this key that are whole; None if there was none."""
    if not os.path.isfile(journal):
        return None
    with open(journal, encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]  # Whole lines.
    if not lines or json.loads(lines[0]) != key:
        return None
    outcomes = (Outcome(**json.loads(line)) for line in lines[1:])
    return {outcome.name: outcome for outcome in outcomes}


def _copy_others(source: str, target: str) -> None:
    """The tokenizer and what else lies beside the weights."""
    if not os.path.isdir(source):
        return
    for name in os.listdir(source):
        path = os.path.join(source, name)
        weights = name.endswith((".safetensors", ".safetensors.index.json"))
        if os.path.isfile(path) and not weights and name != CONFIG:
            shutil.copy2(path, os.path.join(target, name))


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
