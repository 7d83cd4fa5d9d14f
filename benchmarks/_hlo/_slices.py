"""Copies of slices: what a loop moves before something reads it."""

from benchmarks._hlo._program import FREE, FUSIONS, Program, Run, runs

_INDEXING = {"add", "compare", "select", "clamp", "convert", "subtract"}


def copied_slices(program: Program, *, least: int = 2**20) -> list[Run]:
    """Launches that copy a slice of an array at an index, and do nothing else.

    Args:
        program: as `parse` gives it.
        least: bytes of a slice that counts.

    Returns:
        One run for each launch.
    """
    found = []
    for run in runs(program, inside=False):
        instruction = run.instruction
        opcodes = {instruction.opcode}
        if instruction.opcode in FUSIONS:
            inner = (
                one
                for name in instruction.called
                for one in program.computations[name].values()
            )
            # Scalars tell where the slice is.
            opcodes = {one.opcode for one in inner if one.arrays[0].shape} - FREE
        sizes = [array.nbytes for array in instruction.arrays]
        if opcodes - _INDEXING == {"dynamic-slice"} and max(sizes) >= least:
            found.append(run)
    return found
