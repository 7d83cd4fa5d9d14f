"""What an optimized program launches: kernels, fusions, copies."""

import collections
import re
from typing import NamedTuple

from benchmarks._hlo._program import FREE, Instruction, parse, runs

# What they run is listed in their place.
_CALLS = {"call", "while", "conditional"}


class Launch(NamedTuple):
    """One kind of launch.

    Attributes:
        opcode: HLO's.
        what: a custom call's target, else the JAX operation it comes from.
        result: type of what it writes.
    """

    opcode: str
    what: str
    result: str


def launches(hlo: str) -> collections.Counter[Launch]:
    """Every instruction that costs time, with its count, as far as HLO tells.

    A loop's body counts once.
    """
    seen = {
        (run.computation, run.instruction.name): run.instruction
        for run in runs(parse(hlo), inside=False, loops=False)
        if costs_time(run.instruction) and run.instruction.opcode not in _CALLS
    }
    return collections.Counter(map(_launch, seen.values()))


def costs_time(instruction: Instruction) -> bool:
    """Whether the device does something for it, but for waiting."""
    opcode = instruction.opcode
    return opcode not in FREE and not opcode.endswith("-done")


def is_ours(launch: Launch) -> bool:
    """Whether it is one of this library's kernels."""
    return launch.opcode == "custom-call" and "mosaic_gpu" in launch.what


def report(hlo: str) -> list[str]:
    """Lines: count, whose, opcode, where from, result; ours first."""
    rows = sorted(launches(hlo).items(), key=lambda row: (not is_ours(row[0]), row))
    return [
        f"{count:3} {'kernel' if is_ours(launch) else 'OTHER ':6} {launch.opcode:12} "
        f"{launch.what:60} {launch.result}"
        for launch, count in rows
    ]


def _launch(instruction: Instruction) -> Launch:
    result = re.sub(r"\{[^{}]*\}", "", instruction.result)  # The layout.
    return Launch(instruction.opcode, _what(instruction), result)


def _what(instruction: Instruction) -> str:
    path = instruction.source.split("/") if instruction.source else []
    ours = [part for part in path if "fp8jax" in part]
    # Of a long path the operation counts, and which of our functions it is in.
    parts = [instruction.target] if instruction.target else []
    parts += [*ours[-1:], *(path[-1:] if path[-1:] != ours[-1:] else [])]
    return " ".join(parts) or "?"
