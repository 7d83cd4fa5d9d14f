"""What the block shape of a GEMM may depend on."""

import dataclasses
from typing import Literal, get_args

GemmKind = Literal["1d2d", "1d1d"]
GEMM_KINDS: tuple[GemmKind, ...] = get_args(GemmKind)

_POWERS_UP_TO = 256  # Beyond it a bucket is an eighth of the power of two above m.


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """`[m, k]` times `[n, k]` transposed, as a table of tuned configs knows it.

    Attributes:
        kind: "1d2d" (rhs in 128x128 tiles) or "1d1d" (both in 1x128).
        m, n, k: sides; for wgrad, k counts tokens.
        out_dtype: name of the dtype that the kernel stores.
    """

    kind: GemmKind
    m: int
    n: int
    k: int
    out_dtype: str

    @property
    def bucket(self) -> tuple[int, int]:
        """The smallest and the largest m that share a config with this one.

        Powers of two up to 256 and four steps to the next one beyond: 1, 2, 3..4,
        5..8, ..., 129..256, 257..320, 321..384, ... A bucket spans less than 1.25 of m
        where the number of waves counts.
        """
        if self.m <= _POWERS_UP_TO:
            high = 1 << (self.m - 1).bit_length()
            return high // 2 + 1, high
        step = 1 << (self.m - 1).bit_length() - 3
        high = -(-self.m // step) * step
        return high - step + 1, high

    @property
    def key(self) -> "GemmProblem":
        """The same problem for every m of its bucket."""
        return dataclasses.replace(self, m=self.bucket[1])
