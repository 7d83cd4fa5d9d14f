"""What an optimized program launches, by its HLO: kernels, fusions, copies."""

import collections
import re
from typing import NamedTuple

# Nothing runs on the device for these.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
# These run the computations they name; command buffers are calls, too.
_CALLS = {"call", "while", "conditional"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# "  %name = type opcode(operands), attributes"; a type has no space before "(".
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:to_apply|body|condition|_computations?)=(\{[^}]*\}|[%\w.-]+)")


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
    bodies, entry = _computations(hlo)
    found: collections.Counter[Launch] = collections.Counter()
    waiting, seen = [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in bodies:
            continue
        seen.add(name)
        for line in bodies[name]:
            match = _INSTRUCTION.match(line)
            if match is None or match[2] in _FREE or match[2].endswith("-done"):
                continue
            result, opcode, rest = match.groups()
            if opcode in _CALLS:
                for names in _CALLED.findall(rest):
                    waiting += re.findall(r"[\w.-]+", names)
            else:
                result = re.sub(r"\{[^{}]*\}", "", result)  # The layout.
                found[Launch(opcode, _what(rest), result)] += 1
    return found


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


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _what(rest: str) -> str:
    target = re.search(r'custom_call_target="([^"]+)"', rest)
    source = re.search(r'op_name="([^"]+)"', rest)
    path = source[1].split("/") if source else []
    ours = [part for part in path if "fp8jax_" in part]
    # Of a long path the operation counts, and which of our functions it is in.
    parts = [target[1]] if target else []
    parts += [*ours[-1:], *(path[-1:] if path[-1:] != ours[-1:] else [])]
    return " ".join(parts) or "?"
