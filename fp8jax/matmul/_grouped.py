"""Products of groups of rows: those of a mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch, numerics
from fp8jax.matmul._checks import (
    CONTRACTION_TILE,
    check_contraction,
    check_matrix,
    check_out,
    check_qtensor,
)
from fp8jax.quant import QTensor


def grouped_matmul(
    lhs: QTensor,
    rhs: QTensor,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    r"""Rows of `lhs [m, k]` times their group's matrix of `rhs [g, n, k]`, transposed.

    $$out_{ij} = \sum_c s^l_{ic} s^r_{e(i)jc} \sum_{k \in c} l_{ik} r_{e(i)jk}$$

    for row i of group e(i): the first `group_sizes[0]` rows are group 0's, the next
    `group_sizes[1]` group 1's. It is fprop of a layer of experts, and dgrad with the
    transposed weights. The sizes stay on the device.

    Args:
        lhs: `[m, k]` in tiles of `(1, 128)`.
        rhs: `[g, n, k]` in tiles of `(128, 128)` or `(1, 128)`.
        group_sizes: int32 `[g]`; any may be 0. Their sum is at most m.
        out_dtype: bfloat16, float16 or float32; rounded to once, at the end.
        implementation: as in `scaled_matmul`.

    Returns:
        `[m, n]` of `out_dtype`. Rows of no group are 0, whatever the lhs holds there.
        The others are those of `scaled_matmul` of the group, but for the order in which
        XLA sums a chunk.

    Raises:
        ValueError: If shapes, tiles or dtypes do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: `fp8jax.ragged_dot` has gradients.

    Error: that of `scaled_matmul`.
    """
    name = "grouped_matmul"
    check_matrix(name, lhs=lhs)
    check_qtensor(name, "rhs", rhs)
    numerics.check_group_sizes(name, group_sizes)
    groups = len(group_sizes)
    if rhs.ndim != 3 or rhs.shape[0] != groups:
        raise ValueError(
            f"{name} takes rhs as a matrix for each group, [{groups}, n, k] for "
            f"{groups} group_sizes, got rhs.shape={rhs.shape}."
        )
    if lhs.tile[0] != 1:
        raise ValueError(
            f"{name} takes lhs in tiles of (1, {CONTRACTION_TILE}), because a tile of "
            f"more rows may span two groups, got lhs.tile={lhs.tile}."
        )
    check_contraction(name, lhs, rhs)
    check_out(name, out_dtype, None, (lhs.shape[0], rhs.shape[1]))
    return _dispatch.call(
        "grouped_gemm",
        lhs.data,
        lhs.scale,
        rhs.data,
        rhs.scale,
        group_sizes,
        implementation=implementation,
        caller=name,
        lhs_tile=lhs.tile,
        rhs_tile=rhs.tile,
        out_dtype=np.dtype(out_dtype),
    )


def grouped_wgrad(
    lhs: QTensor,
    rhs: QTensor,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    accumulate: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""For every group, `lhs [m, t]` times `rhs [n, t]` transposed, of its own columns.

    $$out_{eij} = \sum_{c \in e} s^l_{ic} s^r_{jc} \sum_{t \in c} l_{it} r_{jt}$$

    over the chunks c of 128 columns that are group e's: wgrad of a layer of experts,
    whose operands are the transposed ones that `quantize_grouped` makes.

    Args:
        lhs: `[m, t]` in tiles of `(1, 128)` or of more rows.
        rhs: `[n, t]` likewise.
        group_sizes: int32 `[g]`, what `quantize_grouped` took.
        out_dtype: bfloat16, float16 or float32; rounded to once, at the end.
        accumulate: float32 `[g, m, n]` to which a float32 product is added, in place
            where XLA need not keep it, as in `scaled_matmul`.
        implementation: as in `grouped_matmul`.

    Returns:
        `[g, m, n]` of `out_dtype`; 0 for a group of no rows.

    Raises:
        ValueError: If shapes, tiles or dtypes do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: `fp8jax.ragged_dot` has gradients.

    Error: that of `scaled_matmul`.
    """
    name = "grouped_wgrad"
    check_matrix(name, lhs=lhs, rhs=rhs)
    check_contraction(name, lhs, rhs)
    numerics.check_group_sizes(name, group_sizes)
    columns = lhs.shape[1]
    if columns % CONTRACTION_TILE:
        raise ValueError(
            f"{name} takes operands as quantize_grouped makes them, with whole tiles "
            f"of {CONTRACTION_TILE} columns, got {columns} columns."
        )
    out_shape = (len(group_sizes), lhs.shape[0], rhs.shape[0])
    check_out(name, out_dtype, accumulate, out_shape)
    return _dispatch.call(
        "grouped_gemm_k",
        lhs.data,
        lhs.scale,
        rhs.data,
        rhs.scale,
        group_sizes,
        *(() if accumulate is None else (accumulate,)),
        implementation=implementation,
        caller=name,
        lhs_tile=lhs.tile,
        rhs_tile=rhs.tile,
        out_dtype=np.dtype(out_dtype),
    )
