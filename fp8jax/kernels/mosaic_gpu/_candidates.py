"""GEMM configs worth measuring for a shape."""

import dataclasses
import itertools

from fp8jax.kernels.mosaic_gpu._choose import computed_config
from fp8jax.kernels.mosaic_gpu._common import ceil_div
from fp8jax.kernels.mosaic_gpu._config import CHUNK, GemmConfig, turned_config
from fp8jax.kernels.mosaic_gpu._limits import refusal
from fp8jax.kernels.mosaic_gpu._problem import GemmKind

_BLOCKS_M = (64, 128, 256)
_BLOCKS_N = (64, 128, 192, 256)
_DEPTHS = (6, 5, 4, 3, 2)
_TURNED_M = 64  # Rows of the lhs that one block takes as its columns.
_SMALL_M = 512  # Above it there are blocks enough for rows of 128 and more.


def gemm_candidates(
    kind: GemmKind, m: int, n: int, k: int, out_dtype: str, num_sms: int
) -> list[GemmConfig]:
    """Configs to measure, the computed one first; the kernel can run each, none twice.

    For every block shape that is not twice as large as the problem: the deepest
    pipeline that fits, with and without a cluster, both ways through the grid.
    """
    first = computed_config(kind, m, n, k, out_dtype, num_sms)
    found = [first]
    if kind == "1d2d" and m <= _TURNED_M:
        found += _turned(m, k)
    chunk_pairs = ((1, 1), (2, 1), (2, 2)) if k > CHUNK else ((1, 1),)
    for block_m, block_n, (chunks, accumulators) in itertools.product(
        _BLOCKS_M, _BLOCKS_N, chunk_pairs
    ):
        if block_m >= 2 * max(m, _BLOCKS_M[0]) or block_n >= 2 * max(n, _BLOCKS_N[0]):
            continue
        if block_m < _BLOCKS_M[1] and m > _SMALL_M:
            continue
        shape = dataclasses.replace(
            first,
            block_m=block_m,
            block_n=block_n,
            # A warpgroup multiplies 64 rows at least: 64 can only be split along n.
            split="n" if block_m == _BLOCKS_M[0] else "m",
            chunks=chunks,
            accumulators=accumulators,
            turned=False,
        )
        deep = (dataclasses.replace(shape, stages=depth) for depth in _DEPTHS)
        fitting = next((c for c in deep if refusal(kind, c) is None), None)
        if fitting is not None:
            found += _schedules(fitting, m, n, num_sms)
    return list(dict.fromkeys(found))


def _turned(m: int, k: int) -> list[GemmConfig]:
    """Of the transposed product: every depth."""
    configs = (
        turned_config(m, chunks, stages)
        for chunks, stages in itertools.product((2, 4) if k > CHUNK else (1,), _DEPTHS)
    )
    return [c for c in configs if refusal("1d2d", c) is None]


def _schedules(config: GemmConfig, m: int, n: int, num_sms: int) -> list[GemmConfig]:
    """The clusters and orders worth trying for one block shape."""
    rows, columns = ceil_div(m, config.block_m), ceil_div(n, config.block_n)
    # A cluster shares the rhs along m: a single row of blocks has nobody to share with.
    clusters = (1, 2) if rows > 1 else (1,)
    # The order matters once there are several waves.
    axes = (0, 1) if rows > 1 and rows * columns > num_sms else (0,)
    return [
        dataclasses.replace(config, cluster=cluster, snake_axis=axis)
        for cluster in clusters
        for axis in axes
    ]
