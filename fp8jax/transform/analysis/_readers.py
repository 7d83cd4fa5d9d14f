"""What reads a product's result before another product does: routers, heads, tables.

A router's scores are ranked, an output head's logits go into a loss's log-sum-exp, and
an embedding's rows are picked by integers, whatever their names are. Each value knows
which products it was computed from without another one in between, and how much of a
log-sum-exp it is.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from jax.extend.core import JaxprEqn

from fp8jax.transform.analysis._values import Value, is_inexact
from fp8jax.transform.ir import Position, aval_of, gathers_rows, primitive_of

Reader = Literal["ranking", "log-sum-exp"]

_RANKINGS = ("approx_top_k", "argmax", "argmin", "top_k")
_EXPONENTIALS = ("exp", "exp2")
_SUMS = ("psum", "psum_invariant", "reduce_sum")
# Of exponentials or their sums, still that: rescaled, or sums of parts added up.
_KEEPING = ("abs", "add", "add_any", "div", "max", "mul", "select_n", "where")


class Readers:
    """What one walk over a program finds.

    Attributes:
        of: by the position of a product, what reads its result.
        tables: `Value.leaves` of matrices whose rows are picked by integers, by a
            gather or by a product with one-hot rows.
    """

    def __init__(self):
        self.of: dict[Position, set[Reader]] = {}
        self.tables = 0
        self._products: dict[Position, int] = {}

    def product(self, position: Position) -> int:
        """`Value.near` of a product's result."""
        return 1 << self._products.setdefault(position, len(self._products))

    def computed(self, eqn: JaxprEqn, operands: Sequence[Value], value: Value) -> Value:
        """The value of an equation that is no product, and what it reads."""
        name, near = primitive_of(eqn), value.near
        part = max((x.part for x in operands), default=0)
        if name in _RANKINGS:
            self._reads("ranking", near)
        if name == "log" and part == 2:
            self._reads("log-sum-exp", near)
        if name in _EXPONENTIALS:
            part = 1
        elif name in _SUMS:
            part = 2 if part else 0
        elif name not in _KEEPING:
            part = 0
        if not any(is_inexact(v.aval) for v in eqn.outvars):
            near = 0  # Ranks, masks: no numbers of the product any more.
        elif name.startswith("reduce_") and not part:
            near = 0  # One number for many columns is no score of one.
        integers = not any(is_inexact(v.aval) for v in eqn.invars)
        one_hot = name == "eq" and integers
        return dataclasses.replace(value, near=near, part=part, one_hot=one_hot)

    def gathered(self, eqn: JaxprEqn, operands: Sequence[Value]) -> None:
        """Notes a table, if a gather reads rows of one."""
        if not gathers_rows(eqn) or operands[0].only_leaf is None:
            return
        table, indices = (aval_of(v) for v in eqn.invars[:2])
        # Of one row, it may be a weight of a stack.
        if table.ndim == 2 and indices.size > 1:
            self.tables |= operands[0].leaves

    def multiplied(self, eqn: JaxprEqn, operands: Sequence[Value]) -> None:
        """Notes a table, if one-hot rows are multiplied by one."""
        tables = operands[1], operands[0]
        for x, table, v in zip(operands, tables, reversed(eqn.invars), strict=True):
            if x.one_hot and table.only_leaf is not None and aval_of(v).ndim == 2:
                self.tables |= table.leaves

    def _reads(self, reader: Reader, near: int) -> None:
        for position, index in self._products.items():
            if near >> index & 1:
                self.of.setdefault(position, set()).add(reader)


def skipped_for(readers: Iterable[Reader]) -> str:
    """Why a product that these read is left out of FP8, or `""`."""
    found = set(readers)
    if "log-sum-exp" in found:
        return "output head: its result goes into a log-sum-exp"
    return "router: its result is ranked" if found else ""


TABLE = "embedding: integers pick its rows"
