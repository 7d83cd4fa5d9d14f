"""What a compiled program does on its devices, read from its scheduled HLO's text."""

from benchmarks._hlo._collectives import Collective, collectives, gathered, sent
from benchmarks._hlo._kernels import Kernel, clones, emulated, kernels
from benchmarks._hlo._launches import Launch, is_ours, launches, report
from benchmarks._hlo._program import Array, Instruction, Program, Run, parse, runs
from benchmarks._hlo._slices import copied_slices
from benchmarks._hlo._weights import copied_weights, transposed_weights

__all__ = [
    "Array",
    "Collective",
    "Instruction",
    "Kernel",
    "Launch",
    "Program",
    "Run",
    "clones",
    "collectives",
    "copied_slices",
    "copied_weights",
    "emulated",
    "gathered",
    "is_ours",
    "kernels",
    "launches",
    "parse",
    "report",
    "runs",
    "sent",
    "transposed_weights",
]
