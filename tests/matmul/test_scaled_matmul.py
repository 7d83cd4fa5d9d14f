"""The XLA GEMM, oracle of every other one, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import matmul
from fp8jax.testing import (
    EDGE_SIZES,
    assert_product_within_float32,
    distinct_scales,
    positive_uniform,
    random_codes,
)

ONE, BLOCK = (1, 128), (128, 128)
SCALED_MATMUL = functools.partial(fp8jax.scaled_matmul, implementation="xla")


def operand(seed, rows, k, tile):
    """Codes of every exponent; scales of which no two agree."""
    rng = np.random.default_rng(seed)
    shape = fp8jax.numerics.scale_shape((rows, k), tile)
    return fp8jax.QTensor(
        jnp.asarray(random_codes(rng, (rows, k))),
        jnp.asarray(distinct_scales(rng, shape)),
        tile,
    )


@pytest.mark.parametrize("tiles", [(ONE, BLOCK), (ONE, ONE)], ids=["1d2d", "1d1d"])
@pytest.mark.parametrize("k", EDGE_SIZES)
@pytest.mark.parametrize(
    ("m", "n"),
    # Each size on each side, not each with each: XLA compiles every shape anew.
    list(zip(EDGE_SIZES, EDGE_SIZES[3:] + EDGE_SIZES[:3], strict=True)),
)
def test_is_the_float64_product(m, n, k, tiles):
    lhs, rhs = operand(0, m, k, tiles[0]), operand(1, n, k, tiles[1])
    out = SCALED_MATMUL(lhs, rhs, out_dtype=jnp.float32)
    assert out.shape == (m, n)
    assert_product_within_float32(out, lhs, rhs)


def test_a_scale_of_another_tile_would_be_seen():
    # The oracle's bound must be able to fail: shift the scales by one tile.
    lhs, rhs = operand(0, 129, 576, ONE), operand(1, 576, 576, BLOCK)
    out = SCALED_MATMUL(lhs, rhs, out_dtype=jnp.float32)
    for axis, wrong in itertools.product((0, 1), ("lhs", "rhs")):
        pair = {"lhs": lhs, "rhs": rhs}
        q = pair[wrong]
        rolled = jnp.roll(q.scale, 1, axis)
        pair[wrong] = fp8jax.QTensor(q.data, rolled, q.tile)
        with pytest.raises(AssertionError):
            assert_product_within_float32(out, **pair)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_output_is_rounded_once(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 300), "f"))
    q, w = fp8jax.quantize(x), fp8jax.quantize(x[:17], fp8jax.BLOCK_128X128)
    full = SCALED_MATMUL(q, w, out_dtype=jnp.float32)
    out = SCALED_MATMUL(q, w, out_dtype=dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, full.astype(dtype))


def test_positive_sums_over_a_long_contraction_keep_float32_accuracy():
    rng = np.random.default_rng(0)
    q = fp8jax.quantize(jnp.asarray(positive_uniform(rng, (32, 4096))))
    w = fp8jax.quantize(
        jnp.asarray(positive_uniform(rng, (48, 4096))), fp8jax.BLOCK_128X128
    )
    out = np.asarray(SCALED_MATMUL(q, w), np.float64)
    left, right = (np.asarray(a.dequantize(), np.float64) for a in (q, w))
    expected = left @ right.T
    # One rounding to bfloat16, whose steps are 2^-7 to 2^-8 of a value: 1.7e-3 in rms,
    # beside which 4096 * 2^-24 of float32's sum adds nothing.
    assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 2e-3


@pytest.mark.parametrize("k", [384, 2048])
@pytest.mark.parametrize("n", [1, 2, 33, 256])
@pytest.mark.parametrize("tiles", [(ONE, BLOCK), (ONE, ONE)], ids=["1d2d", "1d1d"])
def test_bits_of_a_row_do_not_depend_on_how_many_rows_there_are(tiles, n, k):
    # XLA:CPU alone sums a vector's product otherwise, and another backend might more.
    lhs, rhs = operand(0, 300, k, tiles[0]), operand(1, n, k, tiles[1])
    multiply = jax.jit(functools.partial(SCALED_MATMUL, out_dtype=jnp.float32))
    whole = multiply(lhs, rhs)
    for rows in (1, 2, 3, 8, 64, 200):
        part = jax.tree.map(lambda a, rows=rows: a[:rows], lhs)
        np.testing.assert_array_equal(multiply(part, rhs), whole[:rows])
    last = jax.tree.map(lambda a: a[-1:], lhs)
    np.testing.assert_array_equal(multiply(last, rhs), whole[-1:])


def test_rows_in_blocks_and_columns_are_float32_of_the_same_sums_for_any_size():
    # Their bits may differ: XLA picks an order of a chunk's sum by the matrix's size.
    lhs, rhs = operand(0, 300, 384, BLOCK), operand(1, 256, 384, ONE)
    for rows in (128, 256):
        part = fp8jax.QTensor(lhs.data[:rows], lhs.scale[: rows // 128], BLOCK)
        out = SCALED_MATMUL(part, rhs, out_dtype=jnp.float32)
        assert_product_within_float32(out, part, rhs)
    for columns in (1, 8, 100):
        part = jax.tree.map(lambda a, columns=columns: a[:columns], rhs)
        out = SCALED_MATMUL(lhs, part, out_dtype=jnp.float32)
        assert_product_within_float32(out, lhs, part)


@pytest.mark.parametrize("tiles", [(ONE, BLOCK), (ONE, ONE)], ids=["1d2d", "1d1d"])
def test_row_i_does_not_depend_on_other_rows(tiles):
    lhs, rhs = operand(0, 300, 384, tiles[0]), operand(1, 256, 384, tiles[1])
    whole = SCALED_MATMUL(lhs, rhs, out_dtype=jnp.float32)
    poisoned = fp8jax.QTensor(lhs.data, lhs.scale.at[7, 1].set(jnp.nan), lhs.tile)
    out = np.array(SCALED_MATMUL(poisoned, rhs, out_dtype=jnp.float32))
    assert np.all(np.isnan(out[7]))
    out[7] = whole[7]
    np.testing.assert_array_equal(out, whole)


def test_a_nan_weight_block_stays_in_its_columns():
    lhs, rhs = operand(0, 30, 384, ONE), operand(1, 300, 384, BLOCK)
    rhs = fp8jax.QTensor(rhs.data, rhs.scale.at[1, 2].set(jnp.nan), rhs.tile)
    out = np.asarray(SCALED_MATMUL(lhs, rhs))
    bad = np.isnan(out.astype(np.float32))
    assert bad[:, 128:256].all()
    assert not bad[:, :128].any()
    assert not bad[:, 256:].any()


def test_a_blocked_left_operand():
    lhs, rhs = operand(0, 200, 300, BLOCK), operand(1, 70, 300, ONE)
    out = SCALED_MATMUL(lhs, rhs, out_dtype=jnp.float32)
    assert_product_within_float32(out, lhs, rhs)
    np.testing.assert_array_equal(out, SCALED_MATMUL(rhs, lhs, out_dtype=jnp.float32).T)


def test_accumulate_is_added_to():
    lhs, rhs = operand(0, 40, 300, ONE), operand(1, 70, 300, ONE)
    run = functools.partial(SCALED_MATMUL, lhs, rhs, out_dtype=jnp.float32)
    start = jnp.arange(40 * 70, dtype=jnp.float32).reshape(40, 70)
    np.testing.assert_array_equal(run(accumulate=start), start + run())


@pytest.mark.parametrize(
    ("accumulate", "out_dtype", "got"),
    [
        (jnp.zeros((40, 71)), jnp.float32, r"float32\(40, 71\) for float32\(40, 70\)"),
        (jnp.zeros((40, 70), jnp.bfloat16), jnp.float32, "bfloat16.* for float32"),
        (jnp.zeros((40, 70)), jnp.bfloat16, "float32.* for bfloat16"),
    ],
)
def test_accumulate_of_another_shape_or_dtype_is_refused(accumulate, out_dtype, got):
    lhs, rhs = operand(0, 40, 300, ONE), operand(1, 70, 300, ONE)
    with pytest.raises(ValueError, match=f"takes accumulate as .* got {got}"):
        fp8jax.scaled_matmul(lhs, rhs, out_dtype=out_dtype, accumulate=accumulate)


def test_jit_vmap_and_scan_agree():
    lhs, rhs = operand(0, 3 * 32, 300, ONE), operand(1, 64, 300, BLOCK)
    stacked = jax.tree.map(lambda a: a.reshape(3, 32, -1), lhs)
    run = functools.partial(SCALED_MATMUL, out_dtype=jnp.float32)
    expected = jnp.stack(
        [run(jax.tree.map(lambda a, i=i: a[i], stacked), rhs) for i in range(3)]
    )
    mapped = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, rhs)
    _, scanned = jax.lax.scan(lambda c, q: (c, run(q, rhs)), 0, stacked)
    np.testing.assert_array_equal(scanned, expected)
    # A batched dot of XLA:CPU may sum in another order.
    for i in range(3):
        part = jax.tree.map(lambda a, i=i: a[i], stacked)
        assert_product_within_float32(mapped[i], part, rhs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rhs": operand(1, 4, 256, BLOCK)},
            r"\[n, k\], got \(4, 384\) and \(4, 256\)",
        ),
        ({"lhs": jnp.ones((4, 384))}, "takes QTensors, got lhs=.*Array"),
        ({"lhs": operand(1, 4, 384, (1, 64))}, r"128 along.*got lhs.tile=\(1, 64\)"),
        ({"rhs": operand(1, 384, 4, (128, 1))}, r"128 along.*got rhs.tile=\(128, 1\)"),
        ({"out_dtype": jnp.int8}, "out_dtype bfloat16, float16 or float32, got"),
        ({"implementation": "cuda"}, "'cuda' is not known; allowed are None .*'xla'"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"lhs": operand(0, 4, 384, ONE), "rhs": operand(1, 4, 384, BLOCK)}
    with pytest.raises(ValueError, match=message):
        fp8jax.scaled_matmul(**call | change)


def test_stacked_operands_are_refused_with_the_way_out():
    q = fp8jax.quantize(jnp.ones((2, 4, 128)))
    with pytest.raises(ValueError, match=r"vmap it.*lhs\.shape=\(2, 4, 128\)"):
        fp8jax.scaled_matmul(q, q)


def test_the_implementation_that_would_run_has_a_name():
    if jax.default_backend() == "cpu":
        specs = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
        assert matmul.gemm_implementation(*specs) == "xla"
        assert matmul.gemm_implementation(*specs[::-1]) == "xla"
        with pytest.raises(NotImplementedError, match=r"as asked, 'mosaic_gpu'.*9\.0"):
            matmul.gemm_implementation(*specs, "mosaic_gpu")


def test_calls_carry_the_mark_by_which_the_transform_knows_them():
    q = fp8jax.quantize(jnp.ones((4, 128)))
    jaxpr = jax.make_jaxpr(fp8jax.scaled_matmul)(q, q)
    names = [eqn.params.get("name", "") for eqn in jaxpr.eqns]
    assert names == [
        f"{matmul.MARK}gemm_{matmul.gemm_implementation(*[fp8jax.TILE_1X128] * 2)}"
    ]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the CPU's path")
def test_computes_a_tenth_more_than_a_float32_matmul_on_cpu_at_most():
    side, chunk = 1024, 128
    a, b = (jax.ShapeDtypeStruct((side, side), jnp.float32) for _ in range(2))
    q = jax.eval_shape(fp8jax.quantize, a)
    w = jax.eval_shape(lambda b: fp8jax.quantize(b, fp8jax.BLOCK_128X128), b)
    scaled = functools.partial(SCALED_MATMUL, out_dtype=jnp.float32)

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    # XLA counts a loop's body once: a chunk's product, its scaling and the addition.
    one_chunk = flops(scaled, q, w)
    assert one_chunk * (side / chunk) <= 1.1 * flops(lambda a, b: a @ b.T, a, b)
