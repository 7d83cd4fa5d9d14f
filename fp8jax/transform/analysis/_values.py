"""What the analysis knows of a value, of a product, and of where it stands."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.core import AbstractValue
from jax.extend.core import JaxprEqn

from fp8jax.transform.analysis._liveness import Read, is_dead
from fp8jax.transform.analysis._phases import OUTSIDE, Pass, Passes, Phase
from fp8jax.transform.analysis._ragged_form import Ragged
from fp8jax.transform.ir import PRODUCT, RAGGED, Position

Side = Literal["lhs", "rhs"]
SIDES: tuple[Side, Side] = ("lhs", "rhs")
MARKED = "fp8jax::product"  # The `Dot.primitive` of one of our own products.


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """An abstract value.

    Attributes:
        leaves: bit i is set if it depends on leaf i of the function's arguments; the
            bit after the last leaf stands for arrays that the function closes over.
        number: equal numbers, equal computations: a recomputed value has the number of
            the original, a slice of a stack the number of what was stacked.
        root: `number` of the value before casts, reshapes and transpositions.
        product: whether a matrix product went into it.
        cotangent: whether the backward pass went into it.
        residual: whether it was made in the forward pass, or made again as it was, or
            of integers alone.
        ended: whether that pass is over: an optimizer, say, made it of gradients.
        versions: leaves of which it is a version, scaled, masked, stacked or updated.
        others: leaves that went into all of its elements otherwise, gradients aside.
        parts: whether versions are side by side in it.
        near: products that it comes from without another one in between, as bits; no
            part of what makes two values equal.
        part: of a log-sum-exp: 1 for exponentials, 2 for their sum; likewise.
        one_hot: whether it says which of several integers are equal; likewise.
    """

    leaves: int
    number: int
    root: int
    product: bool = False
    cotangent: bool = False
    residual: bool = False
    ended: bool = False
    versions: int = 0
    others: int = 0
    parts: bool = False
    # Not compared: loops are walked until nothing of their carries grows, and what a
    # value is does not depend on what reads it.
    near: int = dataclasses.field(default=0, compare=False)
    part: int = dataclasses.field(default=0, compare=False)
    one_hot: bool = dataclasses.field(default=False, compare=False)

    @property
    def is_spread(self) -> bool:
        """Whether it is repeated numbers of arguments, a version of none."""
        return bool(self.leaves) and not (
            self.versions or self.others or self.cotangent
        )

    @property
    def only_leaf(self) -> int | None:
        """The leaf it is a cast, slice, rescaling, ... of, if there is just one."""
        # A product of one leaf with itself, or its gradient, is no view of it.
        if self.product or self.cotangent or self.leaves.bit_count() != 1:
            return None
        return self.leaves.bit_length() - 1


def union(leaves: Iterable[int]) -> int:
    """All that are in one of these sets of bits."""
    return functools.reduce(operator.or_, leaves, 0)


def joined(values: Sequence[Value]) -> Value:
    """A value that depends on all of these and equals none of them."""
    leaves = union(v.leaves for v in values)
    cotangent = any(v.cotangent for v in values)
    return Value(
        leaves=leaves,
        # Whoever joins gives the number: -1 would make all joined values one.
        number=-1,
        root=-1,
        product=any(v.product for v in values),
        cotangent=cotangent,
        residual=all(v.residual for v in values),
        ended=any(v.ended for v in values),
        others=0 if cotangent else leaves,
        near=union(v.near for v in values),
        part=max((v.part for v in values), default=0),
    )


def is_inexact(aval: AbstractValue) -> bool:
    """Whether values of this type are floats, which have derivatives."""
    # Tokens have no dtype.
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """Where an equation stands.

    Attributes:
        position: of the equation in the nested jaxprs.
        stack: outer and inner name stacks, joined by slashes.
        times: how often the equation runs, as far as scan lengths tell.
        blocked: why nothing here may be rewritten, if so.
        in_shard_map: over the whole mesh, so that values are those of one device.
        in_condition: whether it decides if a loop of unknown length goes on.
        within: the pass of a train step.
        read: which of its results are read.
        is_dead: whether nothing reads any result of it, or of what is around it.
    """

    position: Position = ()
    stack: str = ""
    times: int = 1
    blocked: str | None = None
    in_shard_map: bool = False
    in_condition: bool = False
    within: Pass = OUTSIDE
    read: Read = ()
    is_dead: bool = False

    def at(self, index: int, eqn: JaxprEqn, passes: Passes, read: Read) -> "Scope":
        """The scope of equation `index` of the jaxpr that this scope is about.

        Args:
            index: of the equation.
            eqn: the equation.
            passes: that have been told all equations before it.
            read: which of its results are read.
        """
        # Relative to the jaxpr that the equation is in.
        inner = str(eqn.source_info.name_stack)
        return dataclasses.replace(
            self,
            position=(*self.position, index),
            stack="/".join(part for part in (self.stack, inner) if part),
            within=passes.at(self.within, eqn),
            read=read,
            is_dead=self.is_dead or is_dead(eqn, read),
        )

    def inside(
        self,
        sub_jaxpr: int = 0,
        times: int = 1,
        blocked: str | None = None,
        in_shard_map: bool = False,
        in_condition: bool = False,
    ) -> "Scope":
        """The scope of one of this equation's jaxprs."""
        return dataclasses.replace(
            self,
            position=(*self.position, sub_jaxpr),
            times=self.times * times,
            blocked=self.blocked or blocked,
            in_shard_map=self.in_shard_map or in_shard_map,
            in_condition=self.in_condition or in_condition,
        )

    @property
    def phase(self) -> Phase:
        return self.within.phase

    def in_phase(self, phase: Phase) -> "Scope":
        """The same place in another pass."""
        if phase == self.phase:
            return self
        within = dataclasses.replace(self.within, phase=phase)
        return dataclasses.replace(self, within=within)


@dataclasses.dataclass(frozen=True)
class Dot:
    """A matrix product, or a primitive that holds one.

    Attributes:
        scope: where it stands.
        primitive: `"dot_general"`, or the name of what is only reported.
        lhs, rhs: the operands as abstract values.
        lhs_aval, rhs_aval, out_aval: their types and the result's.
        dimension_numbers: as in `jax.lax.dot_general`; None for other primitives.
        blocked: for our own products, the operand in tiles of more than one row.
        flops: of one run, for a primitive that is no plain product of two operands.
        sizes: rows, columns and contraction of a convolution, as a product.
        ragged: what it is as a product of rows in groups, if it is one.
    """

    scope: Scope
    primitive: str
    lhs: Value
    rhs: Value
    lhs_aval: Any
    rhs_aval: Any
    out_aval: Any
    dimension_numbers: Any = None
    blocked: Side | None = None
    flops: int | None = None
    sizes: tuple[int, int, int] | None = None
    ragged: Ragged | None = None

    @property
    def position(self) -> Position:
        return self.scope.position

    def operand(self, side: Side) -> Value:
        return self.lhs if side == "lhs" else self.rhs

    def aval(self, side: Side) -> Any:
        return self.lhs_aval if side == "lhs" else self.rhs_aval

    def free(self, side: Side) -> int:
        """Size of an operand's dimensions that are neither contracted nor batched."""
        sizes = self._sizes
        if side == "rhs":
            sizes = sizes[1], sizes[0], sizes[2]
        mine, others, out = sizes
        # From sizes alone, whatever order an einsum has dimensions in. Of m k, n k and
        # m n, each times the batch: m m = (m k) (m n) / (n k).
        return math.isqrt(mine * out // max(others * self.batch, 1))

    @property
    def contraction(self) -> int:
        # As in `free`; an empty operand divides by no zero.
        lhs, rhs, out = self._sizes
        return math.isqrt(lhs * rhs // max(out * self.batch, 1))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Elements of the operands and the result, as if there were one group."""
        avals = self.lhs_aval, self.rhs_aval, self.out_aval
        lhs, rhs, out = (_count(aval.shape) for aval in avals)
        if self.ragged is None:
            return lhs, rhs, out
        if self.ragged.form == "wgrad":
            return lhs, rhs, out // self.ragged.groups
        return lhs, rhs // self.ragged.groups, out

    @property
    def is_product(self) -> bool:
        """Whether it is one that may be in FP8."""
        return self.primitive == PRODUCT or (
            self.ragged is not None and self.primitive == RAGGED
        )

    @property
    def batch(self) -> int:
        # A product of rows in groups, or one of ours: its groups are no batch.
        if self.dimension_numbers is None:
            return 1
        _, (dims, _) = self.dimension_numbers
        return _count([self.lhs_aval.shape[d] for d in dims])

    @property
    def has_batch(self) -> bool:
        return (
            self.dimension_numbers is not None and len(self.dimension_numbers[1][0]) > 0
        )

    @property
    def total_flops(self) -> int:
        """Of all runs."""
        # Sizes say all of a plain product; a convolution's rule counts for itself.
        flops = self.flops
        if flops is None:
            sides = self.free("lhs") * self.free("rhs")
            flops = 2 * self.batch * sides * self.contraction
        return flops * self.scope.times


def _count(shape: Sequence[Any]) -> int:
    """Elements; a symbolic dimension of `jax.export` counts as one."""
    return math.prod(size if isinstance(size, int) else 1 for size in shape)


@dataclasses.dataclass(frozen=True)
class HandWritten:
    """A call of a function with a gradient rule of its own.

    Attributes:
        eqn: the call.
        operands: as abstract values.
        scope: where it stands.
    """

    eqn: Any
    operands: tuple[Value, ...]
    scope: Scope


def other_side(side: Side) -> Side:
    """The opposite operand."""
    return "rhs" if side == "lhs" else "lhs"
