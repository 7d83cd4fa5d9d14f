"""What was measured, as a table for people."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fp8jax.kernels.mosaic_gpu import Entry, GemmConfig, GemmProblem
from fp8jax.tune._measure import Timing


def show(problem: GemmProblem, timings: Sequence[Timing], entry: Entry | None) -> None:
    """Prints every candidate, the computed one first, and what was gained."""
    p = problem
    title = f"{p.kind} m={p.m} n={p.n} k={p.k} {p.out_dtype}"
    table = Table("config", "us", "TFLOPS", "compile s", "", title=title)
    for i, timing in enumerate(timings):
        notes = ["computed"] if i == 0 else []
        if entry is not None and timing.config == entry.config:
            notes.append("[bold]fastest[/bold]")
        if timing.note:
            notes.append(escape(timing.note))
        tflops = 2 * p.m * p.n * p.k / timing.us * 1e-6 if timing.us else 0
        table.add_row(
            _brief(timing.config),
            f"{timing.us:.2f}" if timing.us else "",
            f"{tflops:.0f}" if timing.us else "",
            f"{timing.compile_s:.1f}",
            ", ".join(notes),
        )
    console = Console()
    console.print(table)
    if entry is None:
        console.print("The computed config did not run: no entry.")
        return
    total = sum(timing.compile_s for timing in timings)
    console.print(
        f"{entry.us:.2f} us, {entry.computed_us / entry.us:.3f} times the computed "
        f"config's speed. One shape compiles in {timings[0].compile_s:.1f} s, these "
        f"{len(timings)} candidates took {total:.0f} s."
    )


def _brief(config: GemmConfig) -> str:
    fields = dataclasses.asdict(config)
    shape = f"{fields.pop('block_m')}x{fields.pop('block_n')}"
    return " ".join((shape, *(f"{name}={value}" for name, value in fields.items())))
