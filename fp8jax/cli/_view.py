"""What the commands print."""

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fp8jax import numerics
from fp8jax.checkpoint import Difference, Outcome, Reader
from fp8jax.cli._table import show


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


def show_json(items: Iterable[Any]) -> None:
    """One JSON array of objects; numbers that JSON has no word for as strings."""
    tables = [x if isinstance(x, dict) else dataclasses.asdict(x) for x in items]
    print(json.dumps([{k: _plain(v) for k, v in t.items()} for t in tables], indent=1))


def _plain(value: Any) -> Any:
    is_odd = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_odd else value


def not_numbers(outcomes: Iterable[Outcome]) -> list[str]:
    """Names of tensors whose weights hold NaN or infinities."""
    return [o.name for o in outcomes if o.sqnr_db is not None and math.isnan(o.sqnr_db)]


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Tensors with their SQNR and bytes, and the totals."""
    show(
        ("tensor", ">bytes in", ">bytes out", ">SQNR dB", "kept, because"),
        (
            (
                o.name,
                f"{o.bytes_in:,}",
                f"{o.bytes_out:,}",
                "" if o.sqnr_db is None else f"{o.sqnr_db:.2f}",
                o.note,
            )
            for o in outcomes
        ),
    )
    changed = [o for o in outcomes if not o.note]
    for what, group in (("converted", changed), ("all", outcomes)):
        before, after = (sum(getattr(o, f"bytes_{x}") for o in group) for x in _ENDS)
        share = after / before if before else 1.0
        print(
            f"{what}: {len(group)} tensors, {before:,} to {after:,} bytes ({share:.2%})"
        )


_ENDS = ("in", "out")


def tensors(reader: Reader, histograms: Mapping[str, np.ndarray]) -> list[dict]:
    """What there is to say of each tensor; of FP8 ones with a histogram their codes."""
    found = []
    for name, weight in reader.items():
        row: dict[str, Any] = {
            "name": name,
            "dtype": str(weight.stored.dtype),
            "shape": list(weight.stored.shape),
            "bytes": weight.nbytes,
        }
        if weight.scale is not None and weight.tile is not None:
            row |= {
                "kind": weight.kind,
                "tile": list(weight.tile),
                "scale_name": weight.scale_name,
                "scale_dtype": str(weight.scale.dtype),
                "scale_bytes": weight.scale.nbytes,
            }
        if name in histograms:
            row |= _codes(reader, name, histograms[name])
        found.append(row)
    found += [{"name": n, "format": kind} for n, kind in reader.others.items()]
    return found


def _codes(reader: Reader, name: str, counts: np.ndarray) -> dict[str, float]:
    """Shares of codes, and the range of the scales."""
    dtype, scale = reader[name].stored.dtype, reader.scale(name)
    values = np.abs(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32))
    total = max(1, int(counts.sum()))
    largest = counts[values == numerics.max_value(dtype)]
    return {
        "least_scale": float(scale.min()),
        "largest_scale": float(scale.max()),
        "zero": float(counts[values == 0].sum() / total),
        "largest": float(largest.sum() / total),
    }


def show_tensors(rows: Sequence[Mapping[str, Any]]) -> None:
    """Tensors with shapes and bytes; of FP8 ones tiles, scales and codes."""
    with_codes = any("zero" in row for row in rows)
    columns = ["tensor", "dtype", "shape", "a scale per", "scales", ">bytes"]
    if with_codes:
        columns += ["scales from", "to", ">zero", ">largest"]
    show(columns, (_cells(row, with_codes) for row in rows))
    total = sum(row.get("bytes", 0) for row in rows)
    scales = sum(row.get("scale_bytes", 0) for row in rows)
    read = [row for row in rows if "bytes" in row]
    print(f"{len(read)} tensors, {total:,} bytes, {scales:,} of them scales")
    kinds = collections.Counter(_kind(row) for row in read if "kind" in row)
    shown = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    print(f"FP8, a scale for each: {shown}" if kinds else "none is FP8")
    others = collections.Counter(row["format"] for row in rows if "format" in row)
    for kind, count in others.items():
        print(f"not read: {count} tensors of weights in {kind}")
    if with_codes:
        print("zero, largest: shares of codes that are 0 and the format's largest")


def _cells(row: Mapping[str, Any], with_codes: bool) -> list[str]:
    if "format" in row:
        return [row["name"], row["format"], *[""] * (8 if with_codes else 4)]
    cells = [row["name"], row["dtype"], _sides(row["shape"])]
    cells += [_kind(row), row.get("scale_dtype", ""), f"{row['bytes']:,}"]
    if with_codes:
        formats = {"least_scale": ".2e", "largest_scale": ".2e"}
        formats |= {"zero": ".2%", "largest": ".3%"}
        cells += [f"{row[k]:{f}}" if k in row else "" for k, f in formats.items()]
    return cells


def _kind(row: Mapping[str, Any]) -> str:
    """What one scale is of, as the file stores them."""
    if "kind" not in row:
        return ""
    return _sides(row["tile"]) if row["kind"] == "tiles" else row["kind"]


def show_differences(differences: Sequence[Difference]) -> None:
    """Tensors that differ, and how many there are of each kind."""
    counts: dict[str, int] = {}
    rows = []
    for d in differences:
        counts[d.what] = counts.get(d.what, 0) + 1
        if d.what != "same bits":
            sqnr = "" if d.sqnr_db is None else f"{d.sqnr_db:.2f}"
            largest = "" if d.largest is None else f"{d.largest:.3g}"
            rows.append((d.name, d.what, sqnr, largest))
    if rows:
        show(("tensor", "how", ">SQNR dB", ">largest difference"), rows)
    print(", ".join(f"{n} {what}" for what, n in counts.items()) or "empty")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
