"""GEMMs of a mixture of experts: rows in groups, and a contraction in groups.

The dense kernels on other schedules. How large a group is stays on the device.
"""

import functools
from typing import Any

import jax

from fp8jax import _compat
from fp8jax.kernels._contract import Tile
from fp8jax.kernels.mosaic_gpu._common import (
    in_32_bits,
    mapped_under_vmap,
    num_sms,
    zero_pad,
)
from fp8jax.kernels.mosaic_gpu._config import (
    CHUNK,
    GemmConfig,
    column_groups_config,
    row_groups_config,
)
from fp8jax.kernels.mosaic_gpu._gemm_kernel import gemm_padded
from fp8jax.kernels.mosaic_gpu._operands import (
    BLOCK,
    KINDS,
    ROW,
    check_operands,
    output_multiples,
    stored_dtype,
)
from fp8jax.kernels.mosaic_gpu._schedule import (
    ColumnGroups,
    RowGroups,
    column_chunks,
    row_blocks,
)

# An output must be wider than one copy at a group's edge.
_FEWEST_COLUMNS = 128


def grouped_gemm(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    lhs_tile: Tile,
    rhs_tile: Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Rows of `lhs [m, k]` times their group's `rhs [g, n, k]`, transposed, on Hopper.

    `gemm` of each group, bit for bit, in one launch. No row is padded: blocks of 128
    rows (64 where groups are small) end with their group. Sides that are no multiples
    of 8 (m), 32 (n, at least 128) and 128 (k) cost a zero-padded copy.

    Args:
        lhs: FP8 [m, k], the first group's rows first.
        lhs_scale: float32 [m, ceil(k / 128)].
        rhs: FP8 [g, n, k] of the same dtype.
        rhs_scale: float32 [g, ceil(n / 128), ceil(k / 128)].
        group_sizes: int32 [g], in device memory; their sum is at most m.
        lhs_tile, rhs_tile: (1, 128) and (128, 128).
        out_dtype: bfloat16, float32 or float16.

    Returns:
        [m, n] of `out_dtype`; zero in rows of no group, whatever the lhs holds there.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Error: that of `gemm`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    tiles = lhs_tile, rhs_tile
    check_operands("grouped_gemm", lhs, rhs, tiles, ((ROW, BLOCK),), out_dtype)
    run = mapped_under_vmap(
        functools.partial(multiply_rows, out_dtype=stored_dtype(out_dtype))
    )
    return run(lhs, lhs_scale, rhs, rhs_scale, group_sizes).astype(out_dtype)


@in_32_bits
def multiply_rows(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: GemmConfig | None = None,
) -> jax.Array:
    """`grouped_gemm` of what the kernel takes, with a config of choice.

    Args:
        lhs, lhs_scale, rhs, rhs_scale, group_sizes: as in `grouped_gemm`.
        out_dtype: bfloat16 or float32.
        config: the block shape; None takes `row_groups_config`'s.
    """
    (m, k), (groups, n, _), sms = lhs.shape, rhs.shape, num_sms()
    if config is None:
        config = row_groups_config(m, n, k, groups, sms)
    rows, columns = output_multiples(m, n, transposed=False, fewest=_FEWEST_COLUMNS)
    lhs, rhs = zero_pad(lhs, (rows, CHUNK)), zero_pad(rhs, (1, columns, CHUNK))
    schedule = RowGroups(
        m=len(lhs), n=rhs.shape[1], k=lhs.shape[1], config=config, groups=groups
    )
    out = gemm_padded(
        lhs,
        zero_pad(lhs_scale.T, (1, rows)),
        rhs,
        rhs_scale,
        row_blocks(group_sizes, len(lhs), config.block_m * config.cluster),
        schedule=schedule,
        out_dtype=out_dtype,
        num_sms=sms,
        rhs_scale_rows=False,
    )
    return out[:m, :n]


def grouped_gemm_k(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    lhs_tile: Tile,
    rhs_tile: Tile,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The product of each group's columns of `lhs [m, t]` and `rhs [n, t]`, on Hopper.

    `gemm` of each group's columns, bit for bit, in one launch.

    Args:
        lhs: FP8 [m, t], every group in columns of its own from a multiple of 128 on.
        lhs_scale: float32 [m, t / 128], or [ceil(m / 128), t / 128] of blocks.
        rhs: FP8 [n, t] of the same dtype.
        rhs_scale: float32 [n, t / 128], or [ceil(n / 128), t / 128] of blocks.
        group_sizes: int32 [g], in device memory: columns of each group in use.
        accumulate: float32 [g, m, n] to add the product to, as in `gemm`.
        lhs_tile, rhs_tile: (1, 128), and (128, 128) for one of them.
        out_dtype: bfloat16, float32 or float16.

    Returns:
        [g, m, n] of `out_dtype`; zeros for a group without columns.

    Raises:
        NotImplementedError: For other tiles or dtypes.

    Error: that of `gemm`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    name, allowed = "grouped_gemm_k", ((ROW, ROW), (BLOCK, ROW), (ROW, BLOCK))
    tiles = lhs_tile, rhs_tile
    tiles = check_operands(name, lhs, rhs, tiles, allowed, out_dtype)
    how: Any = dict(zip(("lhs_tile", "rhs_tile"), tiles, strict=True))
    operands = lhs, lhs_scale, rhs, rhs_scale, group_sizes
    if accumulate is not None and not _compat.KERNELS_TAKE_REFS:
        return accumulate + grouped_gemm_k(*operands, **how, out_dtype=out_dtype)
    stored = stored_dtype(out_dtype)
    run = mapped_under_vmap(
        functools.partial(multiply_columns, **how, out_dtype=stored)
    )
    added = () if accumulate is None else (accumulate,)
    return run(*operands, *added).astype(out_dtype)


@in_32_bits
def multiply_columns(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    rhs: jax.Array,
    rhs_scale: jax.Array,
    group_sizes: jax.Array,
    accumulate: jax.Array | None = None,
    *,
    lhs_tile: Tile,
    rhs_tile: Tile,
    out_dtype: jax.typing.DTypeLike,
    config: GemmConfig | None = None,
) -> jax.Array:
    """`grouped_gemm_k` of what the kernel takes, with a config of choice.

    Args:
        lhs, lhs_scale, rhs, rhs_scale, group_sizes, accumulate, lhs_tile, rhs_tile: as
            in `grouped_gemm_k`.
        out_dtype: bfloat16 or float32.
        config: the block shape; None takes `column_groups_config`'s.
    """
    transposed = lhs_tile[0] > 1
    if transposed:  # 1d2d of the transposed product, stored turned around.
        lhs, lhs_scale, rhs, rhs_scale = rhs, rhs_scale, lhs, lhs_scale
        rhs_tile = lhs_tile
    (m, k), n, groups, sms = lhs.shape, rhs.shape[0], len(group_sizes), num_sms()
    scale_rows = rhs_tile[0] == 1
    if config is None:
        config = column_groups_config(KINDS[rhs_tile], m, n, k, groups, sms)
    rows, columns = output_multiples(m, n, transposed=transposed)
    if accumulate is not None:
        sides = (columns, rows) if transposed else (rows, columns)
        accumulate = zero_pad(accumulate, (1, *sides))
    lhs, rhs = zero_pad(lhs, (rows, CHUNK)), zero_pad(rhs, (columns, CHUNK))
    schedule = ColumnGroups(
        m=len(lhs), n=len(rhs), k=lhs.shape[1], config=config, groups=groups
    )
    out = gemm_padded(
        lhs,
        # The quantization kernel writes [t / 128, m]: XLA cancels the transposes.
        zero_pad(lhs_scale.T, (1, rows)),
        rhs,
        zero_pad(rhs_scale.T, (1, columns)) if scale_rows else rhs_scale,
        (column_chunks(group_sizes),),
        schedule=schedule,
        out_dtype=out_dtype,
        num_sms=sms,
        rhs_scale_rows=scale_rows,
        transposed=transposed,
        accumulate=accumulate,
    )
    return out[:, :n, :m] if transposed else out[:, :m, :n]
