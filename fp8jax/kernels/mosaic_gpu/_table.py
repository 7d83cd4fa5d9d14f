"""A file of measured GEMM configs: what it says, and when it is refused.

JSON: `schema`, where it was measured (`device_kind`, `num_sms`, `kernel_revision`, for
people `fp8jax` and `jax`), and `entries`, one for each kind, bucket of m, n, k and
dtype. A file that does not fit this process exactly is refused: a stale config runs,
but nobody has measured it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import typing
from typing import Any

import jax

from fp8jax._version import __version__
from fp8jax.kernels.mosaic_gpu._config import GemmConfig
from fp8jax.kernels.mosaic_gpu._limits import refusal
from fp8jax.kernels.mosaic_gpu._problem import GEMM_KINDS, GemmProblem

SCHEMA = 1
_OUT_DTYPES = ("bfloat16", "float32")
_AGAIN = "Measure again with python -m fp8jax.tune."


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured for one problem.

    Attributes:
        problem: with the m that was measured; it stands for its bucket.
        config: the fastest one.
        us: its median kernel time, microseconds.
        computed_us: that of the config that is computed from the shape.
    """

    problem: GemmProblem
    config: GemmConfig
    us: float
    computed_us: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Entries, at most one for each `problem.key`, of one GPU.

    Attributes:
        device_kind: as JAX names it.
        num_sms: its multiprocessors.
        entries: by problem key.
    """

    device_kind: str
    num_sms: int
    entries: dict[GemmProblem, Entry]

    def updated(self, entries: list[Entry]) -> "Table":
        """This table with `entries` in the place of those of the same key."""
        new = {entry.problem.key: entry for entry in entries}
        return dataclasses.replace(self, entries=self.entries | new)


@functools.cache
def kernel_revision() -> str:
    """A hash of this package's code: any change to it makes every table stale."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_table(
    path: str | os.PathLike[str], *, device_kind: str, num_sms: int
) -> Table:
    """The table in the file, if it is one of this GPU and of these kernels.

    Args:
        path: as `write_table` was given.
        device_kind, num_sms: of the GPU in this process.

    Raises:
        OSError: If the file cannot be read.
        ValueError: One line: what the file holds, what is here, and what to do.
    """
    text = pathlib.Path(path).read_text()
    try:
        return _parse(text, device_kind, num_sms)
    except _RefusedError as reason:
        raise ValueError(f"tuning table {os.fspath(path)}: {reason}") from None


def write_table(path: str | os.PathLike[str], table: Table) -> None:
    """Writes the file as a whole or not at all.

    A reader sees the old file or the new one, never half of either.
    """
    path = pathlib.Path(path)
    record = {
        "schema": SCHEMA,
        "fp8jax": __version__,
        "jax": jax.__version__,
        "kernel_revision": kernel_revision(),
        "device_kind": table.device_kind,
        "num_sms": table.num_sms,
        "entries": [
            {
                **dataclasses.asdict(entry.problem),
                "config": dataclasses.asdict(entry.config),
                "us": round(entry.us, 3),
                "computed_us": round(entry.computed_us, 3),
            }
            for entry in table.entries.values()
        ],
    }
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            json.dump(record, file, indent=1)
            file.write("\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


class _RefusedError(Exception):
    """The reason, as the user reads it."""


def _parse(text: str, device_kind: str, num_sms: int) -> Table:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise _RefusedError(f"is no JSON ({error}). {_AGAIN}") from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise _RefusedError(
            f"has schema {schema!r}, this fp8jax reads {SCHEMA}. {_AGAIN}"
        )
    measured = tuple(map(record.get, ("device_kind", "num_sms")))
    if measured != (device_kind, num_sms):
        raise _RefusedError(
            f"was measured on {measured[0]} with {measured[1]} SMs, this process has "
            f"{device_kind} with {num_sms}. {_AGAIN}"
        )
    if record.get("kernel_revision") != kernel_revision():
        raise _RefusedError(
            f"was measured with kernels {record.get('kernel_revision')} (fp8jax "
            f"{record.get('fp8jax')}), these are {kernel_revision()}. {_AGAIN}"
        )
    entries = record.get("entries")
    if not isinstance(entries, list):
        raise _RefusedError(f"has no list of entries. {_AGAIN}")
    parsed = [_entry(i, entry) for i, entry in enumerate(entries)]
    table = Table(device_kind, num_sms, {}).updated(parsed)
    if len(table.entries) != len(parsed):
        raise _RefusedError("has two entries for one kind, bucket of m, n, k, dtype.")
    return table


def _entry(index: int, record: Any) -> Entry:
    where = f"entry {index}"
    names = ("kind", "m", "n", "k", "out_dtype", "config", "us", "computed_us")
    fields = _exactly(where, record, names)
    kind, out_dtype = fields["kind"], fields["out_dtype"]
    if kind not in GEMM_KINDS or out_dtype not in _OUT_DTYPES:
        raise _RefusedError(
            f"{where} is for a GEMM {kind!r} to {out_dtype!r}; allowed are "
            f"{', '.join(GEMM_KINDS)} to {', '.join(_OUT_DTYPES)}. {_AGAIN}"
        )
    m, n, k = (fields[side] for side in "mnk")
    if not all(type(side) is int and side >= 1 for side in (m, n, k)):
        raise _RefusedError(f"{where} has {m=}, {n=}, {k=}; they are integers from 1.")
    times = [fields["us"], fields["computed_us"]]
    if not all(isinstance(t, int | float) and t > 0 for t in times):
        raise _RefusedError(f"{where} has times {times}; they are positive.")
    config = _config(where, fields["config"])
    if why := refusal(kind, config):
        raise _RefusedError(f"{where} has a config that {why}. {_AGAIN}")
    problem = GemmProblem(kind, m, n, k, out_dtype)
    return Entry(problem, config, us=float(times[0]), computed_us=float(times[1]))


def _config(where: str, record: Any) -> GemmConfig:
    types = typing.get_type_hints(GemmConfig)
    fields = _exactly(f"{where}, config", record, tuple(types))
    for name, value in fields.items():
        literals = typing.get_args(types[name])
        fits = value in literals if literals else type(value) is types[name]
        if not fits:
            raise _RefusedError(f"{where} has a config of {name}={value!r}. {_AGAIN}")
    return GemmConfig(**fields)


def _exactly(where: str, record: Any, names: tuple[str, ...]) -> dict[str, Any]:
    got = set(record) if isinstance(record, dict) else set()
    if got != set(names):
        unknown, missing = sorted(got - set(names)), sorted(set(names) - got)
        raise _RefusedError(
            f"{where} has unknown fields {unknown} and lacks {missing}. {_AGAIN}"
        )
    return record
