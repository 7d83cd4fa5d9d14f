"""The Mosaic GPU GEMM of rows in groups: in interpret mode, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.kernels.mosaic_gpu import _config, _grouped
from fp8jax.testing import assert_same_bits
from tests.kernels.grouped import (
    BLOCK,
    ON_GPU,
    ROW,
    by_rows,
    check_rows,
    dense,
    int32,
    interpreted,
    interpreting,
    row_operands,
    row_slices,
    with_nan,
)


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [(0, 0, 24), (1, 1, 1, 1), (5, 0, 9, 9), (0, 0)],
    ids=str,
)
def test_interpreted_rows_are_their_groups_product(sizes):
    check_rows(sizes, 24, 136, 130, interpreting)


@interpreted
@pytest.mark.parametrize(
    ("n", "k", "out_dtype"),
    [(1, 1, "bfloat16"), (33, 128, "float16"), (96, 300, "bfloat16")],
)
def test_interpreted_rows_of_other_sides_and_dtypes(n, k, out_dtype):
    check_rows((3, 0, 6), 13, n, k, interpreting, out_dtype)


@interpreted
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="interpret mode of JAX 0.11 hangs on clusters with several blocks",
)
def test_interpreted_rows_of_a_cluster_past_a_groups_end():
    config = _config.GemmConfig(
        128, 128, "m", chunks=2, accumulators=2, stages=2, cluster=2
    )
    run = functools.partial(
        _grouped.multiply_rows, out_dtype=jnp.float32, config=config
    )
    check_rows((133, 5), 144, 128, 256, interpreting, run=run)


# All in one group, all but one empty, one row each, and ragged; small groups, groups of
# a block and more, clusters.
ROW_CASES = [
    ((1500, 0, 0), 1500, 320, 1100),
    ((0, 0, 1500), 1500, 320, 1100),
    ((0, 1499, 0, 1), 1504, 4096, 256),
    ((1,) * 16, 16, 576, 640),
    ((1,) * 16, 200, 576, 640),
    ((700, 0, 1, 129, 400, 127), 1500, 320, 1100),
    ((0, 0), 129, 256, 300),
    ((1000, 0, 2001, 129), 4096, 2304, 640),
    ((192,) * 32, 6144, 512, 384),
    ((63, 65, 7, 0, 8, 9), 300, 7168, 128),
    ((1, 0), 1, 128, 1),
    ((8192, 8192), 16384, 256, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "m", "n", "k"), ROW_CASES, ids=str)
def test_rows_are_their_groups_product(sizes, m, n, k):
    check_rows(sizes, m, n, k, ON_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "m"), [((5, 0, 61, 1), 70), ((300, 3, 200), 520)])
@pytest.mark.parametrize(
    ("n", "out_dtype"),
    [
        (1, "bfloat16"),
        (7, "float16"),
        (32, "float32"),
        (33, "bfloat16"),
        (64, "bfloat16"),
        (64, "float32"),
        (96, "bfloat16"),
        (127, "float16"),
        (128, "float32"),
        (129, "bfloat16"),
        (160, "float16"),
    ],
)
def test_rows_of_every_width_and_dtype(sizes, m, n, out_dtype):
    check_rows(sizes, m, n, 300, ON_GPU, out_dtype)


@pytest.mark.gpu
def test_rows_of_e5m2():
    check_rows((5, 0, 190), 200, 320, 576, ON_GPU, dtype=jnp.float8_e5m2)


@pytest.mark.gpu
def test_rows_are_those_of_a_loop_over_groups():
    sizes, m, n, k = (129, 0, 1, 300, 64), 500, 320, 1100
    operands = row_operands(len(sizes), m, n, k)
    out = np.asarray(jax.jit(by_rows(jnp.bfloat16))(*operands, int32(sizes)))
    lhs, lhs_scale, rhs, rhs_scale = map(np.asarray, operands)
    run = dense(ROW, BLOCK, jnp.bfloat16)
    parts = [
        np.asarray(run(lhs[rows], lhs_scale[rows], rhs[i], rhs_scale[i]))
        for i, rows in enumerate(row_slices(sizes))
        if sizes[i]
    ]
    assert_same_bits(out[: sum(sizes)], np.concatenate(parts))


def check_nan_in_rows(sizes, m, n, k, context):
    """A NaN in a row, in a group's weight or in no group stays where it is."""
    # NumPy's, and poisoned by it: JAX would compile every change of a place.
    operands = map(np.asarray, row_operands(len(sizes), m, n, k))
    lhs, lhs_scale, rhs, rhs_scale = operands
    run, sizes_ = jax.jit(by_rows()), int32(sizes)
    slices = row_slices(sizes)
    # Rows beside a group's edge, which lie in blocks of both groups.
    edge = slices[0].stop
    assert 0 < edge < sum(sizes)
    with context():
        clean = np.asarray(run(lhs, lhs_scale, rhs, rhs_scale, sizes_))
        for row in (edge - 1, edge):
            bad_scale = with_nan(lhs_scale, np.s_[row, -1])
            bad = with_nan(lhs, np.s_[row, 0])
            for left in ((lhs, bad_scale), (bad, lhs_scale)):
                out = np.array(run(*left, rhs, rhs_scale, sizes_))
                assert np.isnan(out[row]).all()
                out[row] = clean[row]
                assert_same_bits(out, clean)
        for i, rows in enumerate(slices):
            bad = with_nan(rhs_scale, np.s_[i, :, 0])
            out = np.array(run(lhs, lhs_scale, rhs, bad, sizes_))
            assert np.isnan(out[rows]).all()
            out[rows] = clean[rows]
            assert_same_bits(out, clean)


@interpreted
def test_interpreted_nan_stays_in_its_row_or_group():
    check_nan_in_rows((5, 0, 3), 16, 128, 130, interpreting)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "m"), [((77, 0, 45, 3), 140), ((777, 0, 900), 2000)])
def test_nan_stays_in_its_row_or_group(sizes, m):
    check_nan_in_rows(sizes, m, 1700, 576, ON_GPU)
