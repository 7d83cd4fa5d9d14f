"""What devices send one another, and what runs meanwhile."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

from benchmarks._hlo._launches import costs_time
from benchmarks._hlo._program import Array, Instruction, Program, runs, runs_of

# Bytes that a device of `n` sends on a ring for one byte of the operation's result.
_RING = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        name: the instruction's.
        opcode: HLO's, without `-start`.
        arrays: what a device has of it in the end, one for each operand.
        devices: how many take part in one group.
        times: how often it runs in one call.
        between: what runs after its start and before its end; None where it has none
            of its own, so that everything waits.
        kernels: how many of those are Mosaic kernels, in fusions and loops, too.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    devices: int
    times: int
    between: tuple[Instruction, ...] | None = None
    kernels: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its results, in all runs."""
        return self.times * sum(array.nbytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that one device sends on a ring, in all runs."""
        return self.nbytes * _RING[self.opcode](self.devices)


def collectives(program: Program) -> list[Collective]:
    """Every exchange between devices, in the order of the schedule.

    Raises:
        ValueError: If the program is not scheduled, or its groups cannot be read.
    """
    if "is_scheduled=true" not in program.header:
        raise ValueError(
            "collectives takes a scheduled program, as compile() gives; its header is "
            f"{program.header[:80]!r}."
        )
    found = []
    for run in runs(program, inside=False):
        start, inner = run.instruction, _inner(program, run.instruction)
        opcode = _opcode(inner)
        if opcode not in _RING:
            continue
        end, between = _meanwhile(program, run.computation, start)
        below = (runs_of(program, run.computation, i) for i in between or ())
        found.append(
            Collective(
                start.name,
                opcode,
                end.arrays,
                _devices(program, inner),
                run.times,
                between,
                sum(
                    r.times for r in itertools.chain(*below) if r.instruction.is_mosaic
                ),
            )
        )
    return found


def sent(found: Iterable[Collective]) -> float:
    """Bytes that one device sends in one call."""
    return sum(collective.sent for collective in found)


def gathered(
    found: Iterable[Collective], at_least: int = 0
) -> collections.Counter[int]:
    """Sizes in elements of the arrays that devices gather, and how often they do.

    Whether codes or values are gathered, the size is one.

    Args:
        found: the program's collectives.
        at_least: elements below which an array, such as scales, is left out.
    """
    sizes: collections.Counter[int] = collections.Counter()
    for collective in found:
        if collective.opcode == "all-gather":
            for array in collective.arrays:
                if array.size >= at_least:
                    sizes[array.size] += collective.times
    return sizes


def _meanwhile(
    program: Program, computation: str, start: Instruction
) -> tuple[Instruction, tuple[Instruction, ...] | None]:
    """The instruction that has the result, and what is scheduled before it."""
    if not start.opcode.endswith("-start"):
        return start, None
    schedule = list(program.computations[computation].values())
    after = schedule[schedule.index(start) + 1 :]
    names = {start.name}
    for i, instruction in enumerate(after):
        if names.isdisjoint(instruction.operands):
            continue
        if instruction.opcode.endswith("-done"):
            return instruction, tuple(
                x for x in after[:i] if costs_time(x) and not _exchanges(program, x)
            )
        names.add(instruction.name)  # An async-update passes it on.
    raise ValueError(f"collectives found no end of {start.name} in {computation}.")


def _exchanges(program: Program, instruction: Instruction) -> bool:
    return _opcode(_inner(program, instruction)) in _RING


def _inner(program: Program, instruction: Instruction) -> Instruction:
    """What an asynchronous call runs in a computation of its own, else itself."""
    if instruction.opcode.startswith("async-") and instruction.called:
        return program.root(instruction.called[0])
    return instruction


def _opcode(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _devices(program: Program, collective: Instruction) -> int:
    """How many devices are in one group of a collective."""
    attributes = collective.attributes
    if "source_target_pairs" in attributes:
        return 2
    # mesh['x'=4,'y'=2] {'x'}: the axes that are exchanged over, or parts of them.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sides[axis]) for axis, part in axes)
    # [groups,devices]<=[...]: an iota.
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    # {} are all.
    if found := re.search(r"num_partitions=(\d+)", program.header):
        return int(found[1])
    raise ValueError(f"collectives cannot read the groups of {collective.name}.")
