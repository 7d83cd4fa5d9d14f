"""Mosaic kernels of a program: products, quantizations, and calls that XLA doubled."""

import collections
from typing import NamedTuple

from benchmarks._hlo._program import Array, Program, Run, runs
from benchmarks._hlo._values import values

# What computes; all else moves what it reads.
_COMPUTING = {"convert", "convolution", "custom-call", "dot"}


class Kernel(NamedTuple):
    """A call of a Mosaic kernel.

    Attributes:
        name: the instruction's.
        computation: the computation that it stands in.
        operands: types of what it reads.
        results: types of what it writes.
        times: how often it runs in one call of the program.
        source: the JAX operation that it comes from, as a path.
    """

    name: str
    computation: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    times: int
    source: str

    @property
    def is_product(self) -> bool:
        """Whether it multiplies codes: two operands are in FP8."""
        return sum(array.is_fp8 for array in self.operands) >= 2

    @property
    def is_quantization(self) -> bool:
        """Whether it makes codes of something that is none."""
        reads = any(array.is_fp8 for array in self.operands)
        return not reads and any(array.is_fp8 for array in self.results)


def kernels(program: Program) -> list[Kernel]:
    """Every call of a Mosaic kernel, in fusions, too, in the order of the schedule."""
    return [_kernel(program, r) for r in runs(program) if r.instruction.is_mosaic]


def clones(program: Program) -> list[tuple[str, ...]]:
    """Names of calls that are the same kernel on the same operands.

    XLA doubles a call where its result is written into a stack and read on: a copy
    stands in a `dynamic-slice-fusion`, and the kernel runs twice. Recomputation by
    `jax.checkpoint` is none: JAX gives it a path of its own.
    """
    calls = collections.defaultdict(list)
    for instruction, value in values(program):
        if instruction.is_mosaic:
            calls[value, instruction.source].append(instruction.name)
    return [tuple(names) for names in calls.values() if len(names) > 1]


def emulated(program: Program) -> list[Run]:
    """What XLA itself computes from FP8 codes or makes codes of.

    That is a product, a conversion or a call of a library that is no Mosaic kernel but
    reads or writes FP8; what only moves codes is none.
    """

    def is_fp8(run: Run) -> bool:
        arrays = program.read(run.computation, run.instruction)
        return any(array.is_fp8 for array in (*arrays, *run.instruction.arrays))

    return [
        run
        for run in runs(program)
        if run.instruction.opcode in _COMPUTING
        and not run.instruction.is_mosaic
        and is_fp8(run)
    ]


def _kernel(program: Program, run: Run) -> Kernel:
    instruction = run.instruction
    return Kernel(
        instruction.name,
        run.computation,
        program.read(run.computation, instruction),
        instruction.arrays,
        run.times,
        instruction.source,
    )
