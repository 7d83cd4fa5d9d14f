"""What the commands print."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from fp8jax import numerics
from fp8jax.checkpoint import Difference, Outcome, Reader, Weight


@contextlib.contextmanager
def progress(reader: Reader) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a checkpoint, on stderr and only on a terminal."""
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(w.nbytes for w in reader.values()))
        yield lambda nbytes: bar.advance(task, nbytes)


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Tensors with their SQNR and bytes, and the totals."""
    table = _table("tensor", ">bytes in", ">bytes out", ">SQNR dB", "kept, because")
    for o in outcomes:
        table.add_row(
            escape(o.name),
            f"{o.bytes_in:,}",
            f"{o.bytes_out:,}",
            "" if o.sqnr_db is None else f"{o.sqnr_db:.2f}",
            o.note,
        )
    console = Console()
    console.print(table)
    changed = [o for o in outcomes if not o.note]
    for what, group in (("converted", changed), ("all", outcomes)):
        before, after = (sum(getattr(o, f"bytes_{x}") for o in group) for x in _ENDS)
        share = after / before if before else 1.0
        console.print(
            f"{what}: {len(group)} tensors, {before:,} to {after:,} bytes ({share:.2%})"
        )


_ENDS = ("in", "out")


def show_tensors(reader: Reader, histograms: Mapping[str, np.ndarray]) -> None:
    """Tensors with shapes and bytes; of FP8 ones tiles, scales and codes."""
    table = _table(
        "tensor", "dtype", "shape", "tile", "scales", ">bytes", ">zero", ">largest"
    )
    scale_bytes = 0
    for name, weight in reader.items():
        row = [escape(name), str(weight.stored.dtype), _sides(weight.stored.shape)]
        if weight.scale is None or weight.tile is None:
            table.add_row(*row, "", "", f"{weight.nbytes:,}", "", "")
            continue
        scale, counts = reader.scale(name), histograms[name]
        codes = np.arange(256, dtype=np.uint8).view(weight.stored.dtype)
        values = np.abs(codes.astype(np.float32))
        total = max(1, counts.sum())
        zero = counts[values == 0].sum() / total
        largest = counts[values == numerics.max_value(codes.dtype)].sum() / total
        scale_bytes += weight.scale.nbytes
        table.add_row(
            *row,
            _layout(weight),
            f"{weight.scale.dtype} {scale.min():.2e} to {scale.max():.2e}",
            f"{weight.nbytes:,}",
            f"{zero:.2%}",
            f"{largest:.3%}",
        )
    console = Console()
    console.print(table)
    total = sum(w.nbytes for w in reader.values())
    console.print(
        f"{len(reader)} tensors, {total:,} bytes, {scale_bytes:,} of them scales; "
        "zero, largest: shares of codes that are 0 and the format's largest value"
    )
    kinds = collections.Counter(_layout(w) for w in reader.values() if w.scale)
    if kinds:
        shown = (f"{kind} ({count})" for kind, count in kinds.items())
        console.print(f"FP8, a scale for each: {', '.join(shown)}")
    for kind, count in collections.Counter(reader.others.values()).items():
        console.print(f"not read: {count} tensors of weights in {kind}")


def show_differences(differences: Sequence[Difference]) -> None:
    """Tensors that differ, and how many there are of each kind."""
    table = _table("tensor", "", ">SQNR dB", ">largest difference")
    counts: dict[str, int] = {}
    for d in differences:
        counts[d.what] = counts.get(d.what, 0) + 1
        if d.what != "same bits":
            table.add_row(
                escape(d.name),
                d.what,
                "" if d.sqnr_db is None else f"{d.sqnr_db:.2f}",
                "" if d.largest is None else f"{d.largest:.3g}",
            )
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(", ".join(f"{n} {what}" for what, n in counts.items()) or "empty")


def _layout(weight: Weight) -> str:
    """What one scale is of, as the file stores them."""
    if weight.kind == "tiles" and weight.tile is not None:
        return _sides(weight.tile)
    return str(weight.kind)


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        fold = "fold" if column == "tensor" else "ellipsis"
        table.add_column(column.lstrip(">"), justify=justify, overflow=fold)
    return table
