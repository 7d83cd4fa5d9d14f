"""Block shapes of the Mosaic GPU kernels, as pure functions of the problem."""

import dataclasses
from typing import Literal

CHUNK = 128  # Columns of the contraction between two promotions.
SMEM_BYTES = 227 * 1024  # What one CTA may use on Hopper.
_RESERVED_BYTES = 1024  # Barriers and what Mosaic keeps for itself.
OUT_SLOTS = 2  # Output slices of a warpgroup in flight to global memory.
OUT_SLICE_BYTES = 64  # Bytes of an output row that one slice spans.


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one CTA multiplies.

    Attributes:
        block_m: rows of the output block of a CTA.
        block_n: columns of it.
        split: the side of the block that the two math warpgroups share out.
        chunks: chunks of 128 of k in one stage of the pipeline. Each has its own
            accumulator, so that one is promoted while the tensor cores fill the next.
        stages: stages in shared memory.
        cluster: CTAs, neighbours along m, that fetch one rhs block between them.
        snake_axis: the side of the grid of blocks that runs fastest, 0 for m.
        snake_width: how many blocks of that side are walked before the other advances.
        lowering: Mosaic's semantics: "Warpgroup" infers layouts, "Lane" takes them from
            the kernel.
    """

    block_m: int
    block_n: int
    split: Literal["m", "n"]
    chunks: int
    stages: int
    cluster: int
    snake_axis: int = 0
    snake_width: int = 8
    lowering: Literal["Warpgroup", "Lane"] = "Warpgroup"

    @property
    def wg_m(self) -> int:
        """Output rows of one math warpgroup."""
        return self.block_m // 2 if self.split == "m" else self.block_m

    @property
    def wg_n(self) -> int:
        """Output columns of one math warpgroup."""
        return self.block_n // 2 if self.split == "n" else self.block_n

    def smem_bytes(self, *, rhs_scale_rows: bool) -> int:
        """Bytes of shared memory a CTA needs.

        Args:
            rhs_scale_rows: whether every rhs row has a scale of its own (1d1d).
        """
        rows = self.block_m + self.block_n
        scales = self.block_m + (self.block_n if rhs_scale_rows else 0)
        stage = self.chunks * (CHUNK * rows + 4 * scales)
        out = 2 * OUT_SLOTS * self.wg_m * OUT_SLICE_BYTES
        return self.stages * stage + out + _RESERVED_BYTES


def gemm_1d2d_config(m: int, n: int, k: int, num_sms: int) -> GemmConfig:
    """The block shape for `[m, k]` times `[n, k]` with one rhs scale a 128x128 tile.

    A large m gets 128x128 blocks in clusters of two; a small one narrower blocks, so
    that more of the `num_sms` multiprocessors take part in reading the rhs.
    """
    chunks = 2 if k > CHUNK else 1
    if m <= 64:
        blocks_of_128 = -(-n // 128)
        block_n = 128 if blocks_of_128 >= 2 * num_sms else 64
        return GemmConfig(64, block_n, "n", chunks, stages=4, cluster=1)
    if m <= 128:
        blocks_of_128 = -(-n // 128)
        if blocks_of_128 < num_sms:
            return GemmConfig(128, 64, "m", chunks, stages=4, cluster=1)
        return GemmConfig(128, 128, "m", chunks, stages=3, cluster=1)
    # A cluster pays where there is more than one wave of blocks.
    fills = -(-m // 128) * -(-n // 128) > num_sms
    return GemmConfig(
        128,
        128,
        "m",
        chunks,
        stages=3,
        cluster=2 if fills else 1,
        snake_axis=0 if m <= n else 1,
    )


def gemm_1d1d_config(m: int, n: int, k: int, num_sms: int) -> GemmConfig:
    """The block shape for `[m, k]` times `[n, k]` with scales along both rows.

    Promotion costs a product of scales for every element, and bounds this kernel. Tall
    blocks load fewer column scales a row; a second accumulator costs more registers
    than there are.
    """
    del k
    if m <= 64:
        return GemmConfig(64, 64, "n", 1, stages=4, cluster=1)
    if m <= 128:
        return GemmConfig(128, 64, "m", 1, stages=6, cluster=1)
    fills = -(-m // 256) * -(-n // 64) > num_sms
    return GemmConfig(
        256, 64, "m", 1, stages=4, cluster=2 if fills else 1, lowering="Lane"
    )
