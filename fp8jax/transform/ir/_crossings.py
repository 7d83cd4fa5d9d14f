"""How values cross into the bodies of a construct, and out of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jax.extend.core import Var

from fp8jax.transform.ir._types import Atom

# Of an input: the same in every iteration, carried from one to the next, or a slice of
# an array per iteration. The index of a `cond`, which no branch has, is the choice.
InputKind = Literal["choice", "constant", "carry", "slice"]
# Of a result: as a body returns it, carried out of the last iteration, or stacked.
ResultKind = Literal["value", "carry", "stack"]


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """An operand of a construct.

    Attributes:
        operand: outside, a variable or a literal.
        inner: its variable in each body, None in those that do not have it.
        kind: how it crosses.
        params: what the equation's parameters say of this operand alone.
    """

    operand: Atom
    inner: tuple[Var | None, ...]
    kind: InputKind = "constant"
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A result of a construct.

    Attributes:
        outvar: its variable outside.
        inner: what each body returns for it, None for those that return none of it.
        kind: how it crosses.
        params: what the equation's parameters say of this result alone.
    """

    outvar: Var
    inner: tuple[Atom | None, ...]
    kind: ResultKind = "value"
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
