"""`dimension_numbers` reduced to one matrix product, moving as little as possible."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand as `[*batch, rows, columns]`, the contraction on one of the two.

    Attributes:
        permutation: of the dimensions, before the reshape.
        shape: `[*batch, rows, columns]`, after it.
        contraction: which of the last two is contracted, 0 (rows) or 1 (columns).
        ranks: how many dimensions are batch, rows and columns.
    """

    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    contraction: int
    ranks: tuple[int, int, int]

    def arrange(self, x: jax.Array) -> jax.Array:
        if self.permutation != tuple(range(x.ndim)):
            x = lax.transpose(x, self.permutation)
        return x.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A `dot_general` as `lhs` times `rhs`, batch dimensions mapped.

    Attributes:
        lhs, rhs: the operands as matrices.
        batch_rank: number of batch dimensions.
        out_shape: of the result, as `lax.dot_general` gives it.
        numbers: the dimension numbers, none negative.
    """

    lhs: Operand
    rhs: Operand
    batch_rank: int
    out_shape: tuple[int, ...]
    numbers: DimensionNumbers

    @property
    def lhs_free_rank(self) -> int:
        """How many dimensions of the result are those of `lhs`."""
        (l_con, _), (l_bat, _) = self.numbers
        return len(self.lhs.permutation) - len(l_con) - len(l_bat)

    @property
    def exchanged(self) -> "Layout":
        """The layout of `rhs` times `lhs`: the sides of `rhs` come first."""
        (l_con, r_con), (l_bat, r_bat) = self.numbers
        b, free = self.batch_rank, self.lhs_free_rank
        shape = self.out_shape
        return Layout(
            lhs=self.rhs,
            rhs=self.lhs,
            batch_rank=b,
            out_shape=(*shape[:b], *shape[b + free :], *shape[b : b + free]),
            numbers=((r_con, l_con), (r_bat, l_bat)),
        )

    def exchange_sides(self, out: jax.Array) -> jax.Array:
        """This layout's result, turned into that of `exchanged`."""
        b, free = self.batch_rank, self.lhs_free_rank
        sides = range(b + free, out.ndim), range(b, b + free)
        return lax.transpose(out, (*range(b), *sides[0], *sides[1]))


def plan(
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    dimension_numbers: Any,
    name: str,
) -> Layout:
    """How to compute a `dot_general` of these shapes as one GEMM a batch entry.

    Contracted dimensions are flattened in the order in which `lhs` stores them, so
    that a gradient's tokens are tiled alike however the product was written.

    Raises:
        ValueError: On behalf of `name`, if the numbers do not fit the shapes.
    """
    try:
        (l_con, r_con), (l_bat, r_bat) = dimension_numbers
        l_con, r_con, l_bat, r_bat = (
            tuple(int(d) for d in dims) for dims in (l_con, r_con, l_bat, r_bat)
        )
        l_con, l_bat = (_normal(d, len(lhs_shape)) for d in (l_con, l_bat))
        r_con, r_bat = (_normal(d, len(rhs_shape)) for d in (r_con, r_bat))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} takes dimension_numbers as jax.lax.dot_general does, "
            "((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), got "
            f"{dimension_numbers!r} for shapes {lhs_shape} and {rhs_shape}."
        ) from None
    for what, l_dims, r_dims in (
        ("contracts", l_con, r_con),
        ("batches", l_bat, r_bat),
    ):
        l_sizes = tuple(lhs_shape[d] for d in l_dims)
        r_sizes = tuple(rhs_shape[d] for d in r_dims)
        if l_sizes != r_sizes:
            raise ValueError(
                f"{name} {what} dimensions of equal sizes, got {l_sizes} of "
                f"lhs.shape={lhs_shape} and {r_sizes} of rhs.shape={rhs_shape}."
            )
    order = sorted(range(len(l_con)), key=lambda i: l_con[i])
    l_con = tuple(l_con[i] for i in order)
    r_con = tuple(r_con[i] for i in order)
    l_free = _others(len(lhs_shape), l_con + l_bat)
    r_free = _others(len(rhs_shape), r_con + r_bat)
    return Layout(
        lhs=_operand(lhs_shape, l_bat, l_free, l_con),
        rhs=_operand(rhs_shape, r_bat, r_free, r_con),
        batch_rank=len(l_bat),
        out_shape=(
            *(lhs_shape[d] for d in l_bat + l_free),
            *(rhs_shape[d] for d in r_free),
        ),
        numbers=((l_con, r_con), (l_bat, r_bat)),
    )


def _normal(dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if any(not -rank <= d < rank for d in dims):
        raise ValueError
    normal = tuple(d % rank for d in dims)
    if len(set(normal)) != len(normal):
        raise ValueError
    return normal


def _others(rank: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in range(rank) if d not in dims)


def _operand(
    shape: tuple[int, ...],
    batch: tuple[int, ...],
    free: tuple[int, ...],
    contracting: tuple[int, ...],
) -> Operand:
    sizes = [shape[d] for d in batch]
    free_size = math.prod(shape[d] for d in free)
    contraction_size = math.prod(shape[d] for d in contracting)
    rows_first = batch + contracting + free
    if rows_first == tuple(range(len(shape))):  # Stored so: nothing moves.
        ranks = len(batch), len(contracting), len(free)
        return Operand(rows_first, (*sizes, contraction_size, free_size), 0, ranks)
    ranks = len(batch), len(free), len(contracting)
    permutation = batch + free + contracting
    return Operand(permutation, (*sizes, free_size, contraction_size), 1, ranks)
