"""Whether the GEMMs of groups can be relied on: any sizes, same bits, all written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from fp8jax.kernels import mosaic_gpu
from fp8jax.testing import assert_same_bits
from tests.kernels.grouped import (
    BLOCK,
    KINDS,
    ON_GPU,
    ROW,
    by_columns,
    by_rows,
    check_columns,
    check_rows,
    column_operands,
    each_kind,
    int32,
    interpreted,
    interpreting,
    row_operands,
)
from tests.kernels.trust import run_on_poisoned_output

SIZES = (40, 0, 130)
each_call = pytest.mark.parametrize("name", ["rows", *KINDS])


def call_of(name):
    """One of the kernels, and operands but for the sizes, which are at most 176."""
    if name == "rows":
        return by_rows(), row_operands(len(SIZES), 176, 160, 300)
    return by_columns(name), column_operands(name, SIZES, 176, 72, 160)


@interpreted
@each_call
@pytest.mark.parametrize("x64", [False, True])
def test_lowers_for_a_gpu(name, x64):
    run, operands = call_of(name)
    with jax.enable_x64(x64):
        traced = jax.jit(run).trace(*operands, int32(SIZES))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@each_call
def test_with_64_bit_types_enabled(name):
    run, operands = call_of(name)
    expected = jax.jit(run)(*operands, int32(SIZES))
    with jax.enable_x64(True):
        assert_same_bits(jax.jit(run)(*operands, int32(SIZES)), expected)


def check_vmap_and_scan(name, context, cases):
    """Sizes differ from one entry to the next; the other operands do not."""
    (run, operands), sizes = call_of(name), int32(cases)

    def step(carry, s):
        return carry, run(*operands, s)

    with context():
        each = [np.asarray(jax.jit(run)(*operands, s)) for s in sizes]
        in_axes = (*[None] * len(operands), 0)
        mapped = np.asarray(jax.vmap(run, in_axes)(*operands, sizes))
        _, scanned = jax.jit(lambda s: lax.scan(step, jnp.float32(0), s))(sizes)
    assert_same_bits(mapped, np.stack(each))
    assert_same_bits(np.asarray(scanned), np.stack(each))


@interpreted
@pytest.mark.parametrize("name", ["rows", "1d1d"])
def test_interpreted_under_vmap_and_scan(name):
    check_vmap_and_scan(name, interpreting, [(40, 0, 130), (1, 2, 3)])


@pytest.mark.gpu
@each_call
def test_under_vmap_and_scan(name):
    check_vmap_and_scan(name, ON_GPU, [(40, 0, 130), (0, 170, 0), (1, 2, 3)])


@pytest.mark.gpu
@each_kind
def test_twenty_runs_of_columns_give_the_same_bits(kind):
    sizes = (1000, 0, 513, 2000, 1)
    operands = column_operands(kind, sizes, 4000, 1024, 2304)
    check_repeats(by_columns(kind), operands, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [250, 4096])
def test_twenty_runs_of_rows_give_the_same_bits(m):
    sizes = (m // 3, 0, m // 5, 1, m // 4)
    check_repeats(by_rows(jnp.bfloat16), row_operands(5, m, 2304, 1536), sizes)


def check_repeats(run, operands, sizes):
    run = jax.jit(run)
    first = run(*operands, int32(sizes))
    assert all(bool((run(*operands, int32(sizes)) == first).all()) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("sizes", "m", "n"),
    # Sides that need no padding, so that the kernel writes the donated buffer.
    [
        ((5, 0, 61, 1), 72, 160),
        ((0, 0), 264, 256),
        ((700, 0, 1, 129), 1504, 2080),
        ((2048, 2048), 4096, 4128),
    ],
)
def test_every_row_of_a_poisoned_output_is_written(sizes, m, n, out_dtype):
    operands = *row_operands(len(sizes), m, n, 384), int32(sizes)
    check_poisoned(by_rows(out_dtype), operands, (m, n), out_dtype)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "n"), [(128, 96), (160, 1056), (1056, 2080)])
def test_every_group_of_a_poisoned_output_is_written(kind, m, n, out_dtype):
    sizes = (5, 0, 300, 0)
    operands = *column_operands(kind, sizes, 400, m, n), int32(sizes)
    shape = (len(sizes), m, n)
    check_poisoned(by_columns(kind, out_dtype), operands, shape, out_dtype)


def check_poisoned(run, operands, shape, dtype):
    expected = jax.jit(run)(*operands)
    out, same_buffer = run_on_poisoned_output(run, operands, shape, dtype)
    assert same_buffer, "the output was not the poisoned buffer: nothing is tested"
    assert bool(jnp.isfinite(out).all())
    assert_same_bits(out, expected)


# Sizes of four groups in 200 rows, that leave some over.
any_sizes = st.lists(st.integers(0, 200), min_size=4, max_size=4).map(
    lambda cuts: tuple(np.diff([0, *sorted(cuts)]).tolist())
)


def check_any_sizes(sizes, context):
    check_rows(sizes, 200, 160, 256, context)
    spare = 200 - sum(sizes)
    check_columns("1d1d", sizes, 72, 96, context, spare=spare)
    check_columns("2d1d", sizes, 72, 96, context, spare=spare)


@interpreted
@settings(max_examples=2, deadline=None)
@given(any_sizes)
def test_interpreted_groups_of_any_sizes(sizes):
    check_any_sizes(sizes, interpreting)


@pytest.mark.gpu
@settings(max_examples=100, deadline=None)
@given(any_sizes)
@example((0, 0, 0, 200))
@example((128, 0, 64, 8))
@example((7, 1, 120, 1))
def test_groups_of_any_sizes(sizes):
    check_any_sizes(sizes, ON_GPU)


def test_refuses_what_it_cannot_do():
    operands = *row_operands(2, 8, 128, 128), int32((4, 4))
    run = functools.partial(mosaic_gpu.grouped_gemm, out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"got \(\(128, 128\), \(1, 128\)\)"):
        run(*operands, lhs_tile=BLOCK, rhs_tile=ROW)
    with pytest.raises(NotImplementedError, match="out_dtype=int32"):
        by_rows(jnp.int32)(*operands)
    with pytest.raises(NotImplementedError, match="got bfloat16 and float8_e4m3fn"):
        by_rows()(operands[0].astype(jnp.bfloat16), *operands[1:])
    columns = *column_operands("1d1d", (4, 4), 8, 64, 64), int32((4, 4))
    run = functools.partial(mosaic_gpu.grouped_gemm_k, out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"grouped_gemm_k takes .*\(128, 128"):
        run(*columns, lhs_tile=BLOCK, rhs_tile=BLOCK)
