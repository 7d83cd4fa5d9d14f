"""Block shapes of the Mosaic GPU kernels, as pure functions of the problem."""

import dataclasses
import functools
from typing import Literal

CHUNK = 128  # Columns of the contraction between two promotions.
SMEM_BYTES = 227 * 1024  # What one CTA may use on Hopper.
_RESERVED_BYTES = 1024  # Barriers and what Mosaic keeps for itself.
OUT_SLOTS = 3  # Output slices of a warpgroup in flight to global memory.
OUT_SLICE_BYTES = 64  # Bytes of an output row that one slice spans at most.
COPIED_SCALES = 32  # A copy to shared memory moves a multiple of 128 bytes.
_FEW_ROWS = 64  # Of a block: with fewer, nothing but the rhs is worth fetching.


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one CTA multiplies.

    Attributes:
        block_m: rows of the output block of a CTA.
        block_n: columns of it.
        split: the side of the block that two math warpgroups share out; "none" for one
            warpgroup.
        chunks: chunks of 128 of k in one stage of the pipeline.
        accumulators: products of one chunk that a math warpgroup has in flight: with
            two, one is promoted while the tensor cores fill the next. Divides `chunks`.
        stages: stages in shared memory.
        cluster: CTAs, neighbours along m, that fetch one rhs block between them.
        snake_axis: the side of the grid of blocks that runs fastest, 0 for m.
        snake_width: how many blocks of that side are walked before the other advances.
        scales_ahead: whether the rhs scales of 1d2d are read before a stage is awaited.
            It hides their latency where few blocks leave it bare, and costs registers.
        turned: whether the kernel multiplies the rhs by the lhs, and stores the product
            turned around. Rows of a block are then the rhs's, columns the lhs's.
    """

    block_m: int
    block_n: int
    split: Literal["m", "n", "none"]
    chunks: int
    accumulators: int
    stages: int
    cluster: int
    snake_axis: int = 0
    snake_width: int = 8
    scales_ahead: bool = False
    turned: bool = False

    @property
    def warpgroups(self) -> int:
        """Math warpgroups of a CTA."""
        return 1 if self.split == "none" else 2

    @property
    def covers(self) -> tuple[int, int]:
        """Rows and columns of the [m, n] product that a block covers."""
        if self.turned:
            return self.block_n, self.block_m
        return self.block_m, self.block_n

    @property
    def wg_m(self) -> int:
        """Output rows of one math warpgroup."""
        return self.block_m // 2 if self.split == "m" else self.block_m

    @property
    def wg_n(self) -> int:
        """Output columns of one math warpgroup."""
        return self.block_n // 2 if self.split == "n" else self.block_n

    def out_slice_bytes(self, itemsize: int) -> int:
        """Bytes of an output row that one slice spans, of elements of `itemsize`."""
        return min(OUT_SLICE_BYTES, self.wg_n * itemsize)

    def smem_bytes(self, *, rhs_scale_rows: bool) -> int:
        """Bytes of shared memory a CTA needs.

        Args:
            rhs_scale_rows: whether every rhs row has a scale of its own (1d1d).
        """
        rows = self.block_m + self.block_n
        scales = self.block_n if self.turned else self.block_m
        if rhs_scale_rows:
            scales = rows
        stage = self.chunks * (CHUNK * rows + 4 * scales)
        out = self.warpgroups * OUT_SLOTS * self.wg_m * OUT_SLICE_BYTES
        return self.stages * stage + out + _RESERVED_BYTES


def gemm_1d2d_config(m: int, n: int, k: int, num_sms: int) -> GemmConfig:
    """The block shape for `[m, k]` times `[n, k]` with one rhs scale a 128x128 tile.

    A large m gets 128x128 blocks in clusters of two; a small one narrower blocks, so
    that more of the `num_sms` multiprocessors take part in reading the rhs.
    """
    chunks = 2 if k > CHUNK else 1
    narrow = functools.partial(
        GemmConfig, accumulators=chunks, cluster=1, scales_ahead=True
    )
    if m <= _FEW_ROWS:
        # Decoding waits for memory: long stages take fewer copies for the same bytes.
        chunks = 4 if k > 2 * CHUNK else chunks
        shaped = functools.partial(narrow, chunks=chunks, accumulators=chunks)
        if m <= 32:
            return turned_config(m, chunks, stages=3)
        if 2 * -(-n // 64) <= num_sms:
            return shaped(64, 32, "n", stages=4)
        return shaped(64, 64, "n", stages=3)
    if m <= 128 and -(-n // 128) < num_sms:
        return narrow(128, 64, "m", chunks=chunks, stages=4)
    # A cluster pays where there are more than two waves of blocks: CTAs that wait for
    # one another end later, and few blocks have few to make up for it.
    fills = -(-m // 128) * -(-n // 128) > 2 * num_sms
    return GemmConfig(
        128,
        128,
        "m",
        chunks=chunks,
        accumulators=chunks,
        stages=3,
        cluster=2 if fills and m > 128 else 1,
    )


def turned_config(m: int, chunks: int, stages: int) -> GemmConfig:
    """Blocks of 64 rows of the rhs by all m of the lhs, up to 64: decoding.

    A wgmma has 64 rows, and reads them all from shared memory: the rhs's are there,
    where the lhs's would be a half or less.
    """
    block_n = next(
        side for side in (16, 32, 64) if side >= m and side * chunks >= COPIED_SCALES
    )
    return GemmConfig(
        64,
        block_n,
        "none",
        chunks=chunks,
        accumulators=chunks,
        stages=stages,
        cluster=1,
        scales_ahead=True,
        turned=True,
    )


def gemm_1d1d_config(m: int, n: int, k: int, num_sms: int) -> GemmConfig:
    """The block shape for `[m, k]` times `[n, k]` with scales along both rows.

    Promotion costs a product of scales for every element. A second accumulator would
    cost more registers than there are.
    """
    chunks = 2 if k > CHUNK else 1
    if m <= 64:
        return GemmConfig(64, 64, "n", chunks, accumulators=1, stages=4, cluster=1)
    if m <= 128:
        return GemmConfig(128, 64, "m", chunks, accumulators=1, stages=4, cluster=1)
    fills = -(-m // 128) * -(-n // 128) > num_sms
    return GemmConfig(
        128,
        128,
        "m",
        chunks,
        accumulators=1,
        stages=3,
        cluster=2 if fills else 1,
        snake_axis=0 if m <= n else 1,
    )


# Of one product, by the rhs scale.
COMPUTED = {"1d2d": gemm_1d2d_config, "1d1d": gemm_1d1d_config}


def gemm_swiglu_config(k: int) -> GemmConfig:
    """The block shape for two products of a few rows: 128 columns of each.

    A tile of 128 of what is made of them is one warpgroup's.
    """
    chunks = 2 if k > CHUNK else 1
    return GemmConfig(
        64,
        256,
        "n",
        chunks=chunks,
        accumulators=chunks,
        stages=2,
        cluster=1,
        scales_ahead=True,
    )


def row_groups_config(m: int, n: int, k: int, groups: int, num_sms: int) -> GemmConfig:
    """The block shape for rows in groups, 1d2d: by how many rows a group has.

    Args:
        m: rows of all groups together.
        n, k: as in `gemm_1d2d_config`.
        groups: how many there are.
        num_sms: multiprocessors to fill.
    """
    of_group = -(-m // groups)
    chunks = 2 if k > CHUNK else 1
    if of_group <= 64:
        # Columns of a warpgroup fill a slice of rows at a group's edge: 64 in BF16.
        return GemmConfig(
            64,
            128,
            "n",
            chunks=chunks,
            accumulators=chunks,
            stages=4,
            cluster=1,
            scales_ahead=True,
        )
    fills = groups * -(-of_group // 128) * -(-n // 128) > num_sms
    return GemmConfig(
        128,
        128,
        "m",
        chunks=chunks,
        accumulators=chunks,
        stages=3,
        cluster=2 if fills and of_group > 128 else 1,
    )


def batch_config(
    kind: Literal["1d2d", "1d1d"],
    entries: int,
    m: int,
    n: int,
    k: int,
    num_sms: int,
) -> GemmConfig:
    """The block shape for a batch of products: that of one of them, on its share.

    Args:
        kind: by the rhs scale.
        entries: of the batch.
        m, n, k: sides of one product.
        num_sms: multiprocessors to fill.
    """
    # One entry's blocks run beside the next one's.
    config = COMPUTED[kind](m, n, k, max(1, num_sms // entries))
    # Half of an entry's last cluster would be idle, entry after entry.
    wasted = -(-m // config.block_m) % config.cluster
    return dataclasses.replace(config, cluster=1) if wasted else config


def column_groups_config(
    kind: Literal["1d2d", "1d1d"], m: int, n: int, k: int, groups: int, num_sms: int
) -> GemmConfig:
    """The block shape for a contraction in groups: that of one group's product.

    Args:
        kind: by the rhs scale.
        m, n: sides of one group's product.
        k: columns of all groups together.
        groups: how many there are.
        num_sms: multiprocessors to fill.
    """
    # One group's blocks run beside the next one's.
    return COMPUTED[kind](
        max(m, _FEW_ROWS + 1), n, max(k // groups, 2 * CHUNK), max(1, num_sms // groups)
    )
