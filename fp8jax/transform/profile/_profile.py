"""A step's kernel times by product, for people and for programs."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from fractions import Fraction

from fp8jax.transform.plan import (
    Report,
    Row,
    how,
    html_table,
    markdown_table,
    readable,
    text_table,
)
from fp8jax.transform.profile._events import Event, busy_ns
from fp8jax.transform.profile._kinds import OTHERS, kind_of
from fp8jax.transform.profile._origins import Origins


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """What all launches of one kernel take in a step, on one device.

    Attributes:
        name: of the kernel.
        kind: what it is for, as in the table.
        count: how often it runs.
        seconds: of all runs.
    """

    name: str
    kind: str
    count: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class ProfileRow:
    """What one product takes in a step on one device, or all that is no product's.

    Attributes:
        what: `"product"`, or what the kernels are for; `"idle"` for no kernel.
        product: its row in the report; None for what is no product's.
        count: kernels that ran.
        seconds: of their time.
        flops: of one device; 0 for what is no product's.
    """

    what: str
    product: Row | None
    count: float
    seconds: float
    flops: float = 0

    @property
    def tflops(self) -> float:
        """TFLOPS of the product's kernels; 0 where none ran, or for no product."""
        return self.flops / self.seconds * 1e-12 if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Profile:
    """Where a step's time goes on the GPU, as `Report` says what is in FP8.

    Attributes:
        rows: one for each matrix product, in program order, as in the report; then one
            for each other thing that kernels are for, and `"idle"`.
        kernels: the time of each kernel by its name, the longest first.
        seconds: from a step's first kernel to the end of its last one.
        devices: how many GPUs took part; times are means over them.
        device_kind: the GPU's name.
        steps: how many were measured; times are means over them.
    """

    rows: tuple[ProfileRow, ...]
    kernels: tuple[KernelTime, ...]
    seconds: float
    devices: int
    device_kind: str
    steps: int

    def of(self, what: str) -> float:
        """Seconds of all rows of one `what`, `"quantization"` say."""
        return sum(row.seconds for row in self.rows if row.what == what)

    def __str__(self) -> str:
        table = text_table(_HEAD, [*map(self._cells, self.rows)], _NUMBERS)
        return "\n".join((*table, *self._summary()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table and the totals as a notebook shows them."""
        return html_table(_HEAD, [*map(self._cells, self.rows)], self._summary())

    def to_markdown(self) -> str:
        """The table and the totals in Markdown."""
        cells = [*map(self._cells, self.rows)]
        return markdown_table(_HEAD, cells, _NUMBERS, self._summary())

    def to_json(self) -> str:
        """Rows, kernels and totals as a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    def _cells(self, row: ProfileRow) -> list[str]:
        p = row.product
        share = row.seconds / self.seconds if self.seconds else 0.0
        sizes = [str(x) if x else "?" for x in (p.m, p.n, p.k)] if p else [""] * 3
        return [
            (p.path or "-") if p else row.what,
            p.role if p else "",
            *sizes,
            readable(row.count) if row.what != "idle" else "",
            readable(row.seconds * 1e3),
            f"{row.tflops:.0f}" if row.tflops else "",
            f"{share:.1%}",
            how(p) if p else "",
        ]

    def _summary(self) -> list[str]:
        fp8 = [r for r in self.rows if r.product and r.product.status == "fp8"]
        rest = [r for r in self.rows if r.product and r.product.status != "fp8"]
        devices = f"{self.devices} x " if self.devices > 1 else ""
        lines = [
            f"One step: {readable(self.seconds * 1e3)} ms on {devices}"
            f"{self.device_kind}, mean of {self.steps}, without CUDA graphs."
        ]
        for name, rows in (("FP8", fp8), ("other dtypes", rest)):
            seconds = sum(row.seconds for row in rows)
            if seconds:
                rate = sum(row.flops for row in rows if row.seconds) / seconds * 1e-12
                lines.append(
                    f"Products in {name}: {readable(seconds * 1e3)} ms at {rate:.0f} "
                    "TFLOPS."
                )
        return lines


_HEAD = ["path", "role", "m", "n", "k", "count", "ms", "TFLOPS", "share", "how"]
_NUMBERS = range(2, 9)


@dataclasses.dataclass
class _Sum:
    """Of all steps and devices: how many kernels there are, and their time.

    Counts are exact: six sixths of a kernel that products share are one, which a sum of
    floats misses.
    """

    count: Fraction = Fraction(0)
    ns: float = 0.0

    def add(self, ns: float, part: Fraction = Fraction(1)) -> None:
        """Adds a part of one kernel, whose whole time is `ns`."""
        self.count += part
        self.ns += ns * float(part)

    def mean(self, runs: int) -> tuple[float, float]:
        """Kernels and seconds of one of so many runs."""
        return float(self.count / runs), self.ns / runs * 1e-9


def profile_of(
    steps: Sequence[Sequence[Event]],
    origins: Origins,
    report: Report,
    device_kind: str,
    processes: int = 1,
) -> Profile:
    """Adds up what a profiler saw.

    Args:
        steps: the events of each step, by start.
        origins: of the compiled program's operations.
        report: of the same program.
        device_kind: the GPU's name.
        processes: how many run the step, each with as many devices.
    """
    devices = {event.device for step in steps for event in step}
    everywhere = processes * len(devices)
    runs = len(steps) * len(devices)
    kernels: dict[tuple[str, str], _Sum] = collections.defaultdict(_Sum)
    rows: dict[int, _Sum] = collections.defaultdict(_Sum)
    others: dict[str, _Sum] = collections.defaultdict(_Sum)
    total = busy = 0.0
    for step in steps:
        for device in devices:
            events = [event for event in step if event.device == device]
            if events:
                total += max(e.end_ns for e in events) - events[0].start_ns
                busy += busy_ns(events)
        for event in step:
            kind, of_rows = kind_of(event, origins)
            kernels[event.name, kind].add(event.duration_ns)
            if not of_rows:
                others[kind].add(event.duration_ns)
            often = [max(report.rows[row].count, 1) for row in of_rows]
            for row, times in zip(of_rows, often, strict=True):
                rows[row].add(event.duration_ns, Fraction(times, sum(often)))

    table = [
        ProfileRow("product", row, *rows[i].mean(runs), row.flops / everywhere)
        for i, row in enumerate(report.rows)
    ]
    seen = [kind for kind in OTHERS if kind in others]
    table += [ProfileRow(kind, None, *others[kind].mean(runs)) for kind in seen]
    table.append(ProfileRow("idle", None, 0, (total - busy) / runs * 1e-9))
    named = [KernelTime(*key, *times.mean(runs)) for key, times in kernels.items()]
    named.sort(key=lambda kernel: -kernel.seconds)
    return Profile(
        tuple(table),
        tuple(named),
        total / runs * 1e-9,
        len(devices),
        device_kind,
        len(steps),
    )
