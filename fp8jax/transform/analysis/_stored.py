"""Weights that came as QTensors: where a program multiplies by them.

The function sees a QTensor among its arguments as the array it stands for, which a
marked call makes of codes and scales. A product of that array is one of the codes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax import _compat, ops
from fp8jax.transform.analysis._values import SIDES, Side
from fp8jax.transform.call import Dequantize
from fp8jax.transform.ir import (
    AnyJaxpr,
    Atom,
    Calls,
    Position,
    aval_of,
    construct_of,
    equations,
    is_cast,
    is_product,
    permutation,
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An operand that is a QTensor, in the jaxpr that multiplies by it.

    Attributes:
        data, scale: variables of codes and scales there.
        tile: of the codes as they are stored.
        transposed: whether the operand is the transpose of what is stored.
        leaf: of the function's arguments, if that is known.
    """

    data: Any
    scale: Any
    tile: tuple[int, int]
    transposed: bool
    leaf: int | None

    @property
    def operand_tile(self) -> tuple[int, int]:
        """The tile over the operand's own dimensions."""
        rows, columns = self.tile
        return (columns, rows) if self.transposed else (rows, columns)


@dataclasses.dataclass(frozen=True)
class StoredOperands:
    """Where a program uses weights that came as QTensors.

    Attributes:
        of_dots: by position, the operands of a `dot_general` that are such weights.
        inflated: leaves that something else than a product reads, as arrays.
    """

    of_dots: Mapping[Position, Mapping[Side, Stored]]
    inflated: frozenset[int]

    @classmethod
    def of(cls, program: AnyJaxpr, calls: Calls) -> "StoredOperands":
        """Those of a whole program.

        Args:
            program: a jaxpr whose inputs are the leaves.
            calls: the program's own.
        """
        of_dots: dict[Position, Mapping[Side, Stored]] = {}
        inflated: set[int] = set()

        def visit(
            jaxpr: AnyJaxpr, position: Position, leaves: Mapping[Any, int]
        ) -> None:
            stored: dict[Any, Stored] = {}
            for i, eqn in enumerate(equations(jaxpr)):
                call = calls.of(eqn)
                if isinstance(call, Dequantize):
                    data, scale = eqn.invars
                    found = Stored(data, scale, call.tile, False, leaves.get(data))
                    stored[eqn.outvars[0]] = found
                    continue
                read = [
                    (j, stored[x]) for j, x in enumerate(eqn.invars) if _in(x, stored)
                ]
                view = _view(eqn, read[0][1]) if read else None
                if view is not None:
                    stored[eqn.outvars[0]] = view
                elif is_product(eqn):
                    if read:
                        of_dots[(*position, i)] = {SIDES[j]: x for j, x in read}
                else:
                    inflated.update(x.leaf for _, x in read if x.leaf is not None)
                    construct = construct_of(eqn)
                    if construct is None:
                        continue
                    for number, body in enumerate(construct.bodies):
                        inner = {
                            x.inner[number]: leaves[x.operand]
                            for x in construct.inputs
                            if _in(x.operand, leaves)
                        }
                        visit(body, (*position, i, number), inner)

        inputs = _compat.open_jaxpr(program).invars
        visit(program, (), {v: i for i, v in enumerate(inputs)})
        return cls(of_dots, frozenset(inflated))


def _in(x: Atom, variables: Mapping[Any, Any]) -> bool:
    return isinstance(x, core.Var) and x in variables


def _view(eqn: JaxprEqn, x: Stored) -> Stored | None:
    """The result as a stored weight, if the equation is a view of one."""
    if is_cast(eqn) and aval_of(eqn.outvars[0]).dtype in ops.INPUT_DTYPES:
        return x
    if permutation(eqn) == (1, 0):
        return dataclasses.replace(x, transposed=not x.transposed)
    return None
