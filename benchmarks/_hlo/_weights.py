"""Copies and transposes of float32 weights and of their optimizer's moments.

An array is told for one of them by its number of elements, so that it is found in any
layout: take activations of other sizes where they are to be told apart.
"""

from collections.abc import Callable

from benchmarks._hlo._program import Array, Program, Run, runs

# A copy of these fills an array; it moves nothing that was there.
_FILLS = {"broadcast", "constant", "iota"}


def copied_weights(program: Program) -> list[Run]:
    """Copies of float32 arrays that are as large as a weight of the program.

    XLA copies where a result cannot be written in the place of a donated argument.
    """

    def is_copy(run: Run) -> bool:
        x = run.instruction
        if x.opcode not in {"copy", "copy-start"}:
            return False
        source = program.computations[run.computation].get(x.operands[0])
        return source is None or source.opcode not in _FILLS

    return _of_weights(program, is_copy, lambda array: array.dtype == "f32")


def transposed_weights(program: Program) -> list[Run]:
    """Transposes, in fusions or alone, of arrays as large as a weight."""

    def is_transpose(run: Run) -> bool:
        return run.instruction.opcode == "transpose"

    return _of_weights(program, is_transpose, lambda _: True)


def _of_weights(
    program: Program, is_meant: Callable[[Run], bool], is_of: Callable[[Array], bool]
) -> list[Run]:
    """One run for each launch that does it."""
    sizes = {
        array.size
        for instruction in program.computations[program.entry].values()
        if instruction.opcode == "parameter"
        for array in instruction.arrays
        if array.dtype == "f32" and len(array.shape) > 1
    }
    found = {}
    for run in runs(program):
        arrays = run.instruction.arrays[:1]
        if is_meant(run) and any(a.size in sizes and is_of(a) for a in arrays):
            found.setdefault((run.computation, run.launch.name), run)
    return list(found.values())
