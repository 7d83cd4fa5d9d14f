"""Removes what nothing reads any more: activations whose codes are kept, carries."""

from fp8jax.transform.ir import without_dead_code
from fp8jax.transform.lower import Program


def clean(program: Program) -> Program:
    """Removes dead code; the program's inputs and results stay."""
    return program.of(without_dead_code(program.jaxpr))
