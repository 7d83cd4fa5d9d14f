"""The Mosaic GPU GEMM whose contraction is in groups: interpreted, and on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.testing import assert_same_bits
from tests.kernels.grouped import (
    KINDS,
    ON_GPU,
    by_columns,
    check_columns,
    chunk_slices,
    column_operands,
    each_kind,
    int32,
    interpreted,
    interpreting,
    with_nan,
)


@interpreted
@each_kind
@pytest.mark.parametrize("sizes", [(200, 0, 5), (0, 1, 129), (0, 0)], ids=str)
def test_interpreted_columns_are_their_groups_product(sizes, kind):
    check_columns(kind, sizes, 24, 40, interpreting, spare=100)


@interpreted
@pytest.mark.parametrize(
    ("kind", "m", "n", "out_dtype"),
    [
        ("1d1d", 1, 1, "float16"),
        ("2d1d", 160, 33, "bfloat16"),
        ("1d1d", 72, 160, "bfloat16"),
        ("2d1d", 8, 128, "float16"),
    ],
)
def test_interpreted_columns_of_other_sides_and_dtypes(kind, m, n, out_dtype):
    check_columns(kind, (3, 0, 260), m, n, interpreting, out_dtype)


COLUMN_CASES = [
    ((1500, 0, 0), 320, 576, 0),
    ((0, 0, 1500), 320, 576, 0),
    ((1,) * 16, 256, 320, 0),
    ((700, 0, 1, 129, 400, 127), 264, 2080, 143),
    ((0, 0), 256, 128, 300),
    ((1, 0), 128, 128, 0),
    ((4096, 0, 2001, 128), 512, 2304, 5000),
    ((128, 256, 384, 512), 2048, 1024, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["1d1d", "2d1d"])
@pytest.mark.parametrize(("sizes", "m", "n", "spare"), COLUMN_CASES, ids=str)
def test_columns_are_their_groups_product(kind, sizes, m, n, spare):
    check_columns(kind, sizes, m, n, ON_GPU, spare=spare)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["1d1d", "2d1d"])
@pytest.mark.parametrize(
    ("m", "n", "out_dtype"),
    [
        (1, 1, "bfloat16"),
        (1, 33, "float16"),
        (33, 1, "float32"),
        (96, 160, "bfloat16"),
        (129, 70, "bfloat16"),
        (64, 32, "float32"),
        (300, 127, "float16"),
    ],
)
def test_columns_of_every_width_and_dtype(kind, m, n, out_dtype):
    check_columns(kind, (5, 0, 300, 128), m, n, ON_GPU, out_dtype)


@pytest.mark.gpu
@each_kind
def test_columns_of_e5m2(kind):
    check_columns(kind, (5, 0, 300), 256, 320, ON_GPU, dtype=jnp.float8_e5m2)


def check_nan_in_columns(kind, sizes, m, n, context):
    """A NaN on either side of an edge between groups stays in its group's product."""
    # As in `check_nan_in_rows`.
    made = column_operands(kind, sizes, sum(sizes) + 128, m, n)
    operands = [np.asarray(x) for x in made]
    lhs, lhs_scale, rhs, rhs_scale = operands
    run, sizes_ = jax.jit(by_columns(kind)), int32(sizes)
    slices = chunk_slices(sizes)
    tiles = KINDS[kind]
    with context():
        clean = np.asarray(run(*operands, sizes_))
        assert np.isfinite(clean).all()

        def check(group, *bad, rows=np.s_[:], columns=np.s_[:]):
            out = np.array(run(*bad, sizes_))
            if group is not None:
                where = np.s_[group, rows, columns]
                assert np.isnan(out[where]).all()
                out[where] = clean[where]
            assert_same_bits(out, clean)

        for group, chunks in enumerate(slices):
            for chunk in {chunks.start, chunks.stop - 1} if sizes[group] else ():
                column = 128 * chunk
                check(
                    group, with_nan(lhs, np.s_[1, column]), *operands[1:], rows=np.s_[1]
                )
                check(
                    group,
                    lhs,
                    with_nan(lhs_scale, np.s_[0, chunk]),
                    rhs,
                    rhs_scale,
                    rows=np.s_[: tiles[0][0]],
                )
                bad = with_nan(rhs, np.s_[2, column])
                check(group, lhs, lhs_scale, bad, rhs_scale, columns=np.s_[2])
                bad = with_nan(rhs_scale, np.s_[0, chunk])
                check(group, lhs, lhs_scale, rhs, bad, columns=np.s_[: tiles[1][0]])
        # After the last group.
        chunk = slices[-1].stop
        assert chunk < lhs_scale.shape[1]
        bad = with_nan(lhs, np.s_[:, 128 * chunk])
        check(None, bad, with_nan(lhs_scale, np.s_[:, chunk]), rhs, rhs_scale)


@interpreted
@pytest.mark.parametrize("kind", ["1d1d", "2d1d"])
def test_interpreted_nan_stays_in_its_columns(kind):
    check_nan_in_columns(kind, (130, 0, 5), 8, 40, interpreting)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("sizes", [(300, 0, 129, 1), (128, 128, 640)], ids=str)
def test_nan_stays_in_its_columns(kind, sizes):
    check_nan_in_columns(kind, sizes, 320, 576, ON_GPU)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize(("m", "n"), [(256, 320), (33, 70), (8, 64), (200, 32)])
def test_columns_are_added_in_float32(kind, m, n):
    # Not in interpret mode, which has no copy that adds.
    sizes = (300, 0, 1, 128)
    operands = *column_operands(kind, sizes, sum(sizes), m, n), int32(sizes)
    start = jax.random.normal(jax.random.key(0), (len(sizes), m, n))
    run = jax.jit(by_columns(kind))
    assert_same_bits(run(*operands, start), start + run(*operands))


@interpreted
@each_kind
def test_accumulation_of_groups_is_in_place(kind):
    operands = column_operands(kind, (128, 300), 428, 256, 512)
    start = jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)
    run = jax.jit(by_columns(kind), donate_argnums=5)
    traced = run.trace(*operands, int32((128, 300)), start)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"output_operand_alias<.*operand_index = \d", text)
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text
