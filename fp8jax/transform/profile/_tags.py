"""Marks a program's products by the numbers of their rows in the report.

A mark is a name on the equation's name stack. It is not in the program that users run:
there, equal layers are one function, and stay so.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.transform.ir import (
    AnyJaxpr,
    Position,
    Replacer,
    jaxprs_of,
    permutation,
    rewrite_at,
)

_TAG = re.compile(r"\bfp8jax_row_(\d+)\b")


def tagged(jaxpr: AnyJaxpr, positions: Sequence[Position | None]) -> AnyJaxpr:
    """The program with row i's number on the equation at `positions[i]`.

    And on transpositions of its result: XLA folds one into its own products, which then
    have the transposition's name.
    """

    def replacer(jaxpr: AnyJaxpr, rows: Mapping[int, Any]) -> Replacer:
        def replace(eqn: JaxprEqn, row: int) -> list[JaxprEqn]:
            source = eqn.source_info
            names = source.name_stack.extend(f"fp8jax_row_{row}")
            return [eqn.replace(source_info=source.replace(name_stack=names))]

        return replace

    rows = {p: i for i, p in enumerate(positions) if p is not None}
    for position, row in [*rows.items()]:
        for number in _transpositions(_around(jaxpr, position), position[-1]):
            rows.setdefault((*position[:-1], number), row)
    return rewrite_at(jaxpr, rows, replacer)


def _around(jaxpr: AnyJaxpr, position: Position) -> AnyJaxpr:
    """The jaxpr whose own equation is at `position`."""
    for equation, part in zip(position[:-1:2], position[1::2], strict=True):
        jaxpr = jaxprs_of(_compat.open_jaxpr(jaxpr).eqns[equation])[part]
    return jaxpr


def _transpositions(jaxpr: AnyJaxpr, product: int) -> list[int]:
    """The numbers of a jaxpr's equations that transpose what one of them makes."""
    eqns = _compat.open_jaxpr(jaxpr).eqns
    (*_, out) = eqns[product].outvars
    return [
        i for i, eqn in enumerate(eqns) if permutation(eqn) and eqn.invars[0] is out
    ]


def row_in(op_name: str) -> int | None:
    """The number that an operation's name stack holds, the innermost one."""
    found = _TAG.findall(op_name)
    return int(found[-1]) if found else None
