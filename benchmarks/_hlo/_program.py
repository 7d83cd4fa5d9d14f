"""HLO's text as values: arrays, instructions, computations, and how often each runs."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

# Nothing runs on the device for these.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# "  %name = type opcode(operands), attributes"; a type has no space before "(".
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array: `dtype` as HLO spells it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return functools.reduce(lambda a, b: a * b, self.shape, 1)

    @property
    def nbytes(self) -> int:
        """Bytes; those of a type of four bits are packed."""
        if self.dtype == "pred":
            return self.size
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return -(-self.size * int(bits[1]) // 8) if bits else 0  # Tokens have none.

    @property
    def is_fp8(self) -> bool:
        """Whether it holds FP8 codes."""
        return self.dtype.startswith("f8")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: without `%`.
        opcode: HLO's.
        result: type of what it writes, as printed.
        arguments: what stands between the parentheses.
        attributes: what follows them.
        is_root: whether its value is the computation's.
    """

    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str
    is_root: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Types of the arrays it writes, of nested tuples in their order."""
        return _arrays(self.result)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of what it reads."""
        if self.opcode in {"constant", "parameter"}:
            return ()
        # XLA may print an operand with its type or without, and counts long lists.
        bare = re.sub(r"/\*.*?\*/|\{[^{}]*\}|\[[^\[\]]*\]", "", self.arguments)
        words = (part.split() for part in bare.split(","))
        return tuple(part[-1].strip("%()") for part in words if part)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs; reducers of elements are none."""
        if self.opcode not in _CALLING:
            return ()
        found = re.findall(
            rf"\b(?:{_CALLING[self.opcode]})=(\{{[^}}]*\}}|[%\w.-]+)", self.attributes
        )
        return tuple(n for names in found for n in re.findall(r"[\w.-]+", names))

    @property
    def source(self) -> str:
        """The JAX operation that it comes from, as a path."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The function that a custom call calls."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found[1] if found else ""

    @property
    def is_mosaic(self) -> bool:
        """Whether it is a kernel written in Mosaic."""
        return self.opcode == "custom-call" and "mosaic_gpu" in self.target

    @property
    def trips(self) -> int:
        """How often it runs what it calls.

        Raises:
            ValueError: If it is a loop whose number of trips XLA does not know.
        """
        if self.opcode != "while":
            return 1
        if found := _TRIPS.search(self.attributes):
            return int(found[1])
        raise ValueError(
            "runs takes loops whose trips XLA knows, as those of lax.scan; "
            f"{self.name} has no known_trip_count."
        )


# Attributes that name what an instruction runs; command buffers are calls, too.
_CALLING = {
    "call": "to_apply",
    "while": "body|condition",
    "conditional": "branch_computations|true_computation|false_computation",
    "fusion": "calls",
    "fusion-start": "calls",
    "async-start": "calls|called_computation",
}
# These are one launch, whatever is in them.
FUSIONS = {"fusion", "fusion-start", "async-start"}

Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A module: each computation's instructions, in the order of its schedule."""

    header: str
    computations: dict[str, Computation]
    entry: str

    def root(self, name: str) -> Instruction:
        """The instruction whose value is the computation's."""
        return next(i for i in self.computations[name].values() if i.is_root)

    def read(self, computation: str, instruction: Instruction) -> tuple[Array, ...]:
        """Types of the arrays that an instruction of `computation` reads."""
        written = self.computations[computation]
        return tuple(
            array
            for name in instruction.operands
            if name in written
            for array in written[name].arrays
        )


class Run(NamedTuple):
    """An instruction that runs, `times` in one call of the program.

    Attributes:
        instruction: what runs.
        computation: the computation that it stands in.
        times: the product of the trips of all loops around it.
        launch: the instruction that the device launches for it: the fusion or the
            asynchronous call, if it stands in one, else itself.
    """

    instruction: Instruction
    computation: str
    times: int
    launch: Instruction


def parse(hlo: str) -> Program:
    """The text of `compiled.as_text()` as a program.

    Raises:
        ValueError: If no computation in it is the entry.
    """
    computations: dict[str, Computation] = {}
    header = entry = ""
    body: Computation | None = None
    for line in hlo.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif found := _COMPUTATION.match(line):
            body = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif body is not None and (found := _INSTRUCTION.match(line)):
            is_root, name, result, opcode, rest = found.groups()
            split = _closing(rest)
            attributes = rest[split + 1 :].lstrip(", ")
            body[name] = Instruction(
                name, opcode, result, rest[:split], attributes, bool(is_root)
            )
    if not entry:
        raise ValueError(f"parse takes HLO's text with an ENTRY, got {hlo[:80]!r}.")
    return Program(header, computations, entry)


def runs(program: Program, *, inside: bool = True, loops: bool = True) -> Iterator[Run]:
    """Every instruction that runs, in the order of the schedule.

    A branch of a conditional counts as if it ran each time.

    Args:
        program: as `parse` gives it.
        inside: with what stands in fusions, else these count as one instruction.
        loops: whether a loop's body counts as often as it runs, else once.

    Raises:
        ValueError: If XLA does not know how often a loop runs that is to be counted.
    """
    for instruction in program.computations[program.entry].values():
        yield from runs_of(
            program, program.entry, instruction, inside=inside, loops=loops
        )


def runs_of(
    program: Program,
    computation: str,
    instruction: Instruction,
    *,
    inside: bool = True,
    loops: bool = True,
) -> Iterator[Run]:
    """An instruction of `computation` and what it calls, as `runs` gives them."""

    def visit(
        where: str, what: Instruction, times: int, launch: Instruction | None
    ) -> Iterator[Run]:
        yield Run(what, where, times, launch or what)
        fused = what.opcode in FUSIONS
        if fused and not inside:
            return
        each = times * (what.trips if loops else 1)
        for name in what.called:
            for below in program.computations[name].values():
                yield from visit(
                    name, below, each, (launch or what) if fused else launch
                )

    yield from visit(computation, instruction, 1, None)


def _arrays(result: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(result)
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that was open before `text`."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)
