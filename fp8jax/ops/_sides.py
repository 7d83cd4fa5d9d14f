"""The dimensions of a matrix product's arrays by name, each side a few of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fp8jax.ops._layout import Operand
from fp8jax.ops._partition import Factors
from fp8jax.quant import QuantSpec


@dataclasses.dataclass(frozen=True)
class Sides:
    """An array's dimensions as those of a matrix, or of several.

    Attributes:
        batch, rows, columns: names, in the order in which each side is flattened.
    """

    batch: Factors
    rows: Factors
    columns: Factors

    @classmethod
    def of(cls, operand: Operand) -> "Sides":
        batch, rows, columns = (
            tuple(f"{kind}{i}" for i in range(rank))
            for kind, rank in zip("brc", operand.ranks, strict=True)
        )
        return cls(batch, rows, columns)

    @property
    def names(self) -> Factors:
        return (*self.batch, *self.rows, *self.columns)

    @property
    def turned(self) -> "Sides":
        """Those of the transposed matrix."""
        return Sides(self.batch, self.columns, self.rows)

    def contracting(self, contraction: int) -> "Sides":
        """With the contracted side, 0 (rows) or 1 (columns), last: that of codes."""
        return self if contraction == 1 else self.turned

    def in_tiles(self, tile: tuple[int, int]) -> dict[str, int]:
        """The dimensions of which more than one number has a scale, and how many."""
        pairs = zip((self.rows, self.columns), tile, strict=True)
        return {names[-1]: side for names, side in pairs if side > 1}

    def scales_of(
        self, tile: tuple[int, int], number: int
    ) -> tuple[Factors, list[tuple[str, str, int]]]:
        """Names of scales' dimensions, and what they follow: `Factorization.follows`.

        Args:
            tile: of the codes.
            number: of the array in its operation, which tells the names of one apart.
        """
        in_tiles = self.in_tiles(tile)
        scales = tuple(f"s{number}{name}" for name in self.names)
        pairs = zip(scales, self.names, strict=True)
        return scales, [(scale, n, in_tiles.get(n, 1)) for scale, n in pairs]

    def matrix(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape `[*batch, rows, columns]`, given that of each dimension."""
        rows, columns = (
            math.prod(sizes[name] for name in side)
            for side in (self.rows, self.columns)
        )
        return (*(sizes[name] for name in self.batch), rows, columns)

    def scales(
        self, sizes: Mapping[str, int], tile: tuple[int, int]
    ) -> tuple[int, ...]:
        """The shape of scales with a dimension for each of the array's."""
        in_tiles = self.in_tiles(tile)
        return tuple(-(-sizes[name] // in_tiles.get(name, 1)) for name in self.names)


def has_split_codes(operand: Operand, shape: Sequence[int], spec: QuantSpec) -> bool:
    """Whether an operand's tiles lie in one dimension each, so that they can be split.

    Of a side of several dimensions that holds where the last one is a multiple of the
    tile: no tile then reaches from one row of it into the next.

    Args:
        operand: how the array becomes a matrix.
        shape: of the array.
        spec: of its codes, `[free, contraction]`.
    """
    sides = Sides.of(operand).contracting(operand.contraction)
    arranged = (shape[d] for d in operand.permutation)
    sizes = dict(zip(Sides.of(operand).names, arranged, strict=True))
    return 0 not in shape and all(
        len(names) == 1 or (len(names) > 1 and sizes[names[-1]] % side == 0)
        for names, side in zip((sides.rows, sides.columns), spec.tile, strict=True)
    )


def in_rules(
    in_tiles: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    """The dimensions that are several whole tiles: `Factorization.tiles`."""
    return tuple(
        (name, side)
        for name, side in in_tiles.items()
        if sizes[name] > side and sizes[name] % side == 0
    )
