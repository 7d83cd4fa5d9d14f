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


# The scope that one of our GEMMs is launched in, which profilers call it by.
_GEMM = re.compile(r"\bfp8jax_\w*gemm\w*")
_EVENT = re.compile(r"^(fp8jax_\w*gemm\w*?)(?:_mosaic_gpu_kernel)?$")


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


@dataclasses.dataclass(frozen=True)
class Origins:
    """Of which products a compiled program's operations and kernels are.

    XLA says of a kernel of ours which operation it is of if it lies in a fusion. Else
    its name must do, which says its sizes.

    Attributes:
        by_op: the origin of each operation, by its name.
        by_kernel: for the names of our GEMMs outside of fusions, the rows of all
            products that launch one, each once.
    """

    by_op: Mapping[str, Origin]
    by_kernel: Mapping[str, tuple[int, ...]]

    def of(self, op: str) -> Origin:
        """The origin of an operation, the same for all that are not known."""
        return self.by_op.get(op, Origin())

    def rows_of_kernel(self, name: str) -> tuple[int, ...]:
        """The rows that a kernel may be of, by its name in a profile."""
        known = _EVENT.match(name)
        return self.by_kernel.get(known[1], ()) if known else ()


def origins(hlo: str) -> Origins:
    """Reads the text of a compiled module."""
    own: dict[str, Origin] = {}
    calls: dict[str, str] = {}
    inside: dict[str, list[str]] = {}
    gemms: dict[str, str] = {}
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
            if multiplies and (kernel := _GEMM.findall(scopes)):
                gemms[name] = kernel[-1]
    fused = {name for called in calls.values() for name in inside.get(called, ())}
    # A row once: it counts all its runs, and unrolled loops have an operation for each.
    by_kernel: dict[str, dict[int, None]] = {}
    for name, kernel in gemms.items():
        row = own[name].row
        if row is not None and name not in fused:
            by_kernel.setdefault(kernel, {})[row] = None
    return Origins(
        {name: _with_inside(name, own, calls, inside) for name in own},
        {kernel: tuple(rows) for kernel, rows in by_kernel.items()},
    )


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
