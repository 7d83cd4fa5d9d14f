"""How the fused RMS normalization divides rows, as a pure function of their length."""

import dataclasses
import math

from fp8jax.kernels.mosaic_gpu._encode import BLOCK

PART = 64  # Tiles that a warpgroup holds in registers at a time.
_MOST_PARTS = 2
GRAIN = 8  # Copies move whole groups of 8 tiles.


@dataclasses.dataclass(frozen=True)
class RmsNormConfig:
    """How one CTA normalizes.

    Attributes:
        chunks: tiles of 128 in a row, padded.
        rows: rows in a step.
        parts: how often 64 tiles fit what a step holds, rounded up.
        stages: steps in shared memory.
        ctas_per_sm: CTAs that share a multiprocessor.
    """

    chunks: int
    rows: int
    parts: int
    stages: int
    ctas_per_sm: int

    @property
    def tiles(self) -> int:
        """Tiles in a step."""
        return self.rows * self.chunks


def rms_norm_config(k: int, itemsize: int = 2, inputs: int = 1) -> RmsNormConfig | None:
    """How to divide rows of `k`; None if they are too long.

    A step takes so many rows that 64 tiles are full; one, of longer rows. Four steps
    and two CTAs were fastest on an H200, where they fit.

    Args:
        k: length of a row.
        itemsize: bytes of an element.
        inputs: 2 where a residual is added.
    """
    chunks = -(-k // BLOCK)
    rows = GRAIN // math.gcd(chunks, GRAIN)
    if rows * chunks > _MOST_PARTS * PART:
        chunks, rows = -(-chunks // GRAIN) * GRAIN, 1
    if chunks > _MOST_PARTS * PART:
        return None
    rows *= max(1, PART // (rows * chunks))
    parts = -(-rows * chunks // PART)
    if inputs > 1:
        size = parts * itemsize  # Of a stage: 2 for 16 KB.
        if size > 4:  # Two stages of both do not fit.
            return None
        return RmsNormConfig(chunks, rows, parts, 2, ctas_per_sm=2 if size == 2 else 1)
    stages = 4 if parts == 1 and itemsize == 2 else 2
    return RmsNormConfig(chunks, rows, parts, stages, ctas_per_sm=3 - parts)
