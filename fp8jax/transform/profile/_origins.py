"""Of which product each operation of a compiled program is."""

import dataclasses
import re
from collections.abc import Mapping

from fp8jax.transform.profile._tags import row_in

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([^\s,}]+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
# XLA's products, and ours where they lie in a fusion with what they write to.
_MULTIPLIES = re.compile(
    r" (?:dot|convolution)\(|custom_call_target=\"(?:__cublas|mosaic_gpu)"
)
_QUANTIZES = "fp8jax::quantize"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an operation was in the program that was traced.

    Attributes:
        row: the report's row whose product it is of; None if it is of none.
        quantizes: whether it makes codes.
        multiplies: whether it is a matrix product, or holds one.
    """

    row: int | None = None
    quantizes: bool = False
    multiplies: bool = False


def origins(hlo: str) -> Mapping[str, Origin]:
    """The origin of every operation, by its name.

    Args:
        hlo: the text of a compiled module.
    """
    own: dict[str, Origin] = {}
    calls: dict[str, str] = {}
    inside: dict[str, list[str]] = {}
    computation = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        elif instruction := _INSTRUCTION.match(line):
            name = instruction[1]
            inside.setdefault(computation, []).append(name)
            op_name = _OP_NAME.search(line)
            scopes = op_name[1] if op_name else ""
            quantizes = _QUANTIZES in scopes
            multiplies = not quantizes and bool(_MULTIPLIES.search(line))
            own[name] = Origin(row_in(scopes), quantizes, multiplies)
            if called := _CALLED.search(line):
                calls[name] = called[1]
    return {name: _with_inside(name, own, calls, inside) for name in own}


def _with_inside(
    name: str,
    own: Mapping[str, Origin],
    calls: Mapping[str, str],
    inside: Mapping[str, list[str]],
) -> Origin:
    """An operation's origin, or that of the first product within it."""
    for part in inside.get(calls.get(name, ""), ()):
        origin = _with_inside(part, own, calls, inside)
        if origin.multiplies:
            return origin
    return own[name]
