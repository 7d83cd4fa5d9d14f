"""What the blocks' kernel quantizes, and how it leaves: values, directions, formats."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from fp8jax.kernels._contract import ScaleKind, Tile
from fp8jax.kernels.mosaic_gpu._encode import BLOCK

Compute = Callable[..., tuple[jax.Array, ...]]

ROW: Tile = (1, BLOCK)
BOX: Tile = (BLOCK, BLOCK)


@dataclasses.dataclass(frozen=True)
class Direction:
    """One way to quantize a matrix of values.

    Attributes:
        tile: (1, 128) or (128, 128), of the codes as they are written.
        transposed: whether they are written transposed.
    """

    tile: Tile
    transposed: bool

    @property
    def name(self) -> str:
        """Its tile as the matrix lies."""
        rows, columns = self.tile[::-1] if self.transposed else self.tile
        return f"{rows}x{columns}"


_ALONG = Direction(ROW, transposed=False)


@dataclasses.dataclass(frozen=True)
class Format:
    """What the codes are: `dtype`, kind of scale, and the floor of amax."""

    dtype: np.dtype
    kind: ScaleKind
    eps: float


@dataclasses.dataclass(frozen=True)
class Values:
    """What is quantized, as computed from the inputs.

    Attributes:
        op: the op that asks for it, for the kernel's name.
        compute: pieces of the matrices, in their dtypes, and of the vectors, float32
            and repeated over rows or columns, to pieces of the values, elementwise;
            None for the one matrix itself.
        dtypes: of the values.
        directions: for each value, how it leaves; at least one way.
        sides: for each vector, which side of the matrices it lies along: 0, one number
            per row, or 1, one per column.
    """

    op: str
    compute: Compute | None
    dtypes: tuple[np.dtype, ...]
    directions: tuple[tuple[Direction, ...], ...]
    sides: tuple[int, ...] = ()

    @property
    def is_direct(self) -> bool:
        """Whether the one value leaves as it is computed, and only so.

        Then it need not be in shared memory, where other directions would read it.
        """
        return self.compute is not None and self.directions == ((_ALONG,),)

    def places(self, dtypes: Sequence[np.dtype]) -> tuple[int | None, ...]:
        """The input whose block each value is written over; None for one of its own.

        Args:
            dtypes: of the matrices.
        """
        if self.is_direct:
            return (0,)
        free = list(range(len(dtypes)))
        found: list[int | None] = []
        for dtype in self.dtypes:
            place = next((i for i in free if dtypes[i] == dtype), None)
            if place is not None:
                free.remove(place)
            found.append(place)
        return tuple(found)
