"""Which instructions of a scheduled program compute the same value."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from benchmarks._hlo._program import FUSIONS, Instruction, Program

# Their result has the elements of their operand, in its order.
_SAME = {"async-update", "bitcast", "copy", "copy-start", "reshape"}
# Names and places, which tell equal instructions apart.
_IDENTITY = re.compile(
    r"(?:metadata|frontend_attributes|control-predecessors)=\{[^{}]*\},?\s*"
)
# Of equal operands these do not give equal values.
_OWN = re.compile(r"all-|collective-|infeed|ragged-all|recv|reduce-scatter|rng|send")
_CONFIG = re.compile(r"backend_config=.*$")
_REDUCER = re.compile(r"\b(?:to_apply|calls|comparator)=%?([\w.-]+)")


def values(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Instructions and numbers: two with one number compute the same from the same.

    Fusions are looked into, each with what it reads. What a loop or a collective gives
    is a value of its own.
    """
    numbering = _Numbering(program)
    fused = {
        name
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode in FUSIONS
        for name in instruction.called
    }
    for name in program.computations:
        if name not in fused:
            yield from numbering.visit(name, None)[1]


class _Numbering:
    """Gives equal keys equal numbers."""

    def __init__(self, program: Program):
        self._program = program
        self._numbers: dict[Any, int] = {}
        self._fresh = itertools.count()

    def visit(
        self, computation: str, arguments: list[Any] | None
    ) -> tuple[Any, list[tuple[Instruction, int]]]:
        """The root's value, and each instruction with its own."""
        known: dict[str, Any] = {}
        found: list[tuple[Instruction, int]] = []
        root: Any = None
        for x in self._program.computations[computation].values():
            reads = [known.get(name) for name in x.operands]
            if x.opcode == "parameter" and arguments is not None:
                value = arguments[int(x.arguments)]
            elif x.opcode in FUSIONS:
                value, below = self.visit(x.called[0], reads)
                found += below
            elif x.opcode == "tuple":
                value = tuple(reads)
            elif x.opcode == "get-tuple-element" and isinstance(reads[0], tuple):
                index = re.search(r"\bindex=(\d+)", x.attributes)
                assert index
                value = reads[0][int(index[1])]
            elif x.opcode in _SAME or x.opcode.endswith("-done"):
                value = reads[0]
            else:
                value = self._number(self._key(x, reads))
            known[x.name] = value
            root = value if x.is_root else root
            if isinstance(value, int):
                found.append((x, value))
        return root, found

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _key(self, x: Instruction, reads: list[Any]) -> Any:
        if x.opcode == "parameter" or x.called or _OWN.match(x.opcode):
            return next(self._fresh)
        attributes = _IDENTITY.sub("", x.attributes)
        if x.opcode != "custom-call":
            attributes = _CONFIG.sub("", attributes)
        attributes = _REDUCER.sub(self._opcodes, attributes)
        result = re.sub(r"\{[^{}]*\}", "", x.result)
        literal = x.arguments if x.opcode == "constant" else ""
        return x.opcode, result, literal, attributes.rstrip(", "), tuple(reads)

    def _opcodes(self, match: re.Match[str]) -> str:
        """A reducer is what it does: equal ones have several names."""
        body = self._program.computations.get(match[1], {})
        return " ".join(instruction.opcode for instruction in body.values())
