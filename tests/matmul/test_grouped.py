"""Products of groups of rows, and their quantization, against one group at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import matmul, numerics, quant
from fp8jax.testing import (
    assert_product_within_float32,
    assert_same_bits,
    distinct_scales,
    quantize_numpy,
    random_codes,
)

ONE, BLOCK = (1, 128), (128, 128)
# Of at most 300 rows: none over, some over, empty groups at every place, one row each.
SIZES = [
    (300,),
    (128, 172),
    (0, 5, 0, 130, 65, 0),
    (1, 1, 1),
    (0, 0),
    (64, 0, 127, 1, 107, 1),
]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
ROWS = 300


def slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(int(e - s), int(e)) for e, s in zip(ends, sizes, strict=True)]


def column_slices(sizes):
    """Where `quantize_grouped` has each group's columns, spelled out in NumPy."""
    chunks = [-(-s // 128) for s in sizes]
    begins = [128 * sum(chunks[:i]) for i in range(len(sizes))]
    return [slice(b, b + s) for b, s in zip(begins, sizes, strict=True)]


def lhs_of(rng, rows, k):
    scale = distinct_scales(rng, (rows, -(-k // 128)))
    data = random_codes(rng, (rows, k))
    return fp8jax.QTensor(jnp.asarray(data), jnp.asarray(scale), ONE)


def rhs_of(rng, groups, n, k, tile):
    shape = numerics.scale_shape((groups, n, k), tile)
    data, scale = random_codes(rng, (groups, n, k)), distinct_scales(rng, shape)
    return fp8jax.QTensor(jnp.asarray(data), jnp.asarray(scale), tile)


def part(q, *index):
    return fp8jax.QTensor(q.data[index], q.scale[index], q.tile)


@every_size
def test_blocks_hold_every_row_once_and_no_two_groups(sizes):
    for size in (8, 128):
        blocks = numerics.group_blocks(jnp.asarray(sizes, jnp.int32), ROWS, size)
        blocks = [np.asarray(x) for x in blocks]
        assert {len(x) for x in blocks} == {
            numerics.count_group_blocks(ROWS, len(sizes), size)
        }
        held = [
            (group, row)
            for group, first, rows in zip(*blocks, strict=True)
            for row in range(first, first + rows)
        ]
        assert held == [
            (i, row) for i, s in enumerate(slices(sizes)) for row in range(ROWS)[s]
        ]
        group, first, rows = blocks
        starts = np.append([s.start for s in slices(sizes)], 0)
        assert ((first - starts[group]) % size == 0)[rows > 0].all()
        assert (group == len(sizes))[rows == 0].all()


@pytest.mark.parametrize(
    ("rows", "groups", "size"), [(300, 4, 128), (3, 8, 128), (128, 1, 128), (385, 2, 8)]
)
def test_the_count_of_blocks_is_reached_and_not_passed(rows, groups, size):
    count = numerics.count_group_blocks(rows, groups, size)
    needed = [
        sum(-(-s // size) for s in np.diff([0, *cuts, rows]))
        for cuts in np.random.default_rng(0)
        .integers(0, rows + 1, (200, groups - 1))
        .tolist()
        for cuts in [sorted(cuts)]
    ]
    begun = min(groups, rows)
    worst = [1] * (begun - 1) + [rows - begun + 1]
    assert max(needed) <= count == sum(-(-s // size) for s in worst)


@pytest.mark.parametrize(
    ("sizes", "tile"), [*((s, BLOCK) for s in SIZES), (SIZES[2], ONE)], ids=str
)
def test_rows_are_those_of_their_groups_product(sizes, tile):
    rng = np.random.default_rng(0)
    k, n = 300, 140
    lhs, rhs = lhs_of(rng, ROWS, k), rhs_of(rng, len(sizes), n, k, tile)
    out = matmul.grouped_matmul(
        lhs,
        rhs,
        jnp.asarray(sizes, jnp.int32),
        out_dtype=jnp.float32,
        implementation="xla",
    )
    assert out.shape == (ROWS, n)
    for i, rows in enumerate(slices(sizes)):
        if sizes[i]:
            assert_product_within_float32(out[rows], part(lhs, rows), part(rhs, i))
    assert not np.asarray(out[sum(sizes) :]).any()


def test_what_lies_in_one_group_or_in_none_stays_there():
    rng, sizes = np.random.default_rng(0), (100, 0, 60, 70)
    lhs, rhs = lhs_of(rng, ROWS, 256), rhs_of(rng, 4, 128, 256, BLOCK)
    run = functools.partial(
        matmul.grouped_matmul,
        group_sizes=jnp.asarray(sizes, jnp.int32),
        implementation="xla",
    )
    clean = np.asarray(run(lhs, rhs), np.float32)
    bad = lhs.scale.at[230:].set(jnp.nan)  # Rows of no group.
    np.testing.assert_array_equal(
        np.asarray(run(fp8jax.QTensor(lhs.data, bad, ONE), rhs), np.float32), clean
    )
    bad = rhs.scale.at[2].set(jnp.nan)
    out = np.array(run(lhs, fp8jax.QTensor(rhs.data, bad, BLOCK)), np.float32)
    assert np.isnan(out[100:160]).all()
    out[100:160] = clean[100:160]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize(
    ("sizes", "tile"), [*((s, ONE) for s in SIZES), (SIZES[2], BLOCK)], ids=str
)
def test_groups_are_quantized_in_columns_of_their_own(sizes, tile):
    x = np.random.default_rng(0).standard_normal((ROWS, 200), "f")
    x[sum(sizes) :] = np.nan  # Of no group.
    along, across = quant.quantize_grouped(
        jnp.asarray(x),
        jnp.asarray(sizes, jnp.int32),
        spec_t=fp8jax.QuantSpec(tile),
        implementation="xla",
    )
    columns = quant.grouped_columns(ROWS, len(sizes))
    assert across.shape == (200, columns)
    data = np.zeros((200, columns), across.dtype)
    scale = np.ones(numerics.scale_shape((200, columns), tile), np.float32)
    for rows, to in zip(slices(sizes), column_slices(sizes), strict=True):
        if rows.stop > rows.start:
            codes, factors = quantize_numpy(x[rows].T, tile)
            data[:, to] = codes
            scale[:, to.start // 128 : to.start // 128 + factors.shape[1]] = factors
    assert_same_bits((across.data, across.scale), (data, scale))
    assert_same_bits(along, fp8jax.quantize(jnp.asarray(x), implementation="xla"))


def test_specs_of_two_formats_and_one_direction():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((60, 200), "f"))
    sizes = jnp.asarray((20, 40), jnp.int32)
    e5m2 = fp8jax.QuantSpec(dtype=jnp.float8_e5m2)
    along, across = quant.quantize_grouped(x, sizes, spec_t=e5m2)
    assert (along.dtype, across.dtype) == (jnp.float8_e4m3fn, jnp.float8_e5m2)
    assert_same_bits(quant.quantize_grouped(x, sizes, None, e5m2), (None, across))


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        *((s, (ONE, ONE)) for s in SIZES),
        (SIZES[2], (ONE, BLOCK)),
        (SIZES[2], (BLOCK, ONE)),
    ],
    ids=str,
)
def test_wgrad_is_each_groups_product(sizes, tiles):
    rng = np.random.default_rng(0)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    lhs, rhs = (
        quant.quantize_grouped(
            jnp.asarray(rng.standard_normal((ROWS, side), "f")),
            group_sizes,
            None,
            fp8jax.QuantSpec(tile),
            implementation="xla",
        )[1]
        for side, tile in zip((140, 200), tiles, strict=True)
    )
    run = functools.partial(
        matmul.grouped_wgrad, lhs, rhs, group_sizes, implementation="xla"
    )
    out = run()
    assert out.shape == (len(sizes), 140, 200)
    for i, to in enumerate(column_slices(sizes)):
        if sizes[i]:
            chunks = slice(to.start // 128, -(-to.stop // 128))
            whole = slice(128 * chunks.start, 128 * chunks.stop)
            pair = [
                fp8jax.QTensor(q.data[:, whole], q.scale[:, chunks], q.tile)
                for q in (lhs, rhs)
            ]
            assert_product_within_float32(out[i], *pair)
            np.testing.assert_array_equal(
                out[i],
                fp8jax.scaled_matmul(
                    *pair, out_dtype=jnp.float32, implementation="xla"
                ),
            )
        else:
            assert not np.asarray(out[i]).any()
    start = jnp.ones_like(out)
    np.testing.assert_array_equal(run(accumulate=start), start + out)


def test_sizes_are_data_under_jit_vmap_and_scan():
    rng = np.random.default_rng(0)
    lhs, rhs = lhs_of(rng, 48, 256), rhs_of(rng, 3, 64, 256, BLOCK)
    sizes = jnp.asarray([(16, 16, 16), (0, 48, 0), (3, 0, 20)], jnp.int32)

    def run(s):
        x = lhs.dequantize()
        _, across = quant.quantize_grouped(x, s, implementation="xla")
        return (
            matmul.grouped_matmul(lhs, rhs, s, implementation="xla"),
            matmul.grouped_wgrad(across, across, s, implementation="xla"),
        )

    one_by_one = [jax.jit(run)(s) for s in sizes]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    _, scanned = jax.lax.scan(lambda c, s: (c, run(s)), 0, sizes)
    assert_same_bits(scanned, expected)
    for got, want in zip(jax.vmap(run)(sizes), expected, strict=True):
        # A batched dot of XLA:CPU may sum in another order.
        # Then the one rounding may fall on the other side: an ulp of bfloat16.
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7
        )


def test_in_a_shard_map():
    rng, mesh = (
        np.random.default_rng(0),
        jax.make_mesh((2,), ("data",), (AxisType.Auto,)),
    )
    x = jnp.asarray(rng.standard_normal((64, 256), "f"))
    rhs = rhs_of(rng, 2, 64, 256, BLOCK)
    sizes = jnp.asarray([20, 12, 0, 30], jnp.int32)  # Two groups a device.

    def run(x, rhs, s):
        along, across = quant.quantize_grouped(x, s, implementation="xla")
        out = matmul.grouped_matmul(along, rhs, s, implementation="xla")
        return out, matmul.grouped_wgrad(across, across, s, implementation="xla")

    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
    )
    halves = [run(x[32 * i :][:32], rhs, sizes[2 * i :][:2]) for i in (0, 1)]
    expected = jax.tree.map(lambda *a: jnp.concatenate(a), *halves)
    assert_same_bits(jax.jit(split)(x, rhs, sizes), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_sizes": jnp.ones(2)}, r"int32 \[g\].* got float32\[2\]"),
        ({"group_sizes": jnp.int32(2)}, r"at least one group, got int32\[\]"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, r"\[3, n, k\] .*got rhs.shape=\(2, "),
        ({"lhs": jnp.ones((4, 256))}, "takes QTensors, got lhs="),
        ({"lhs": fp8jax.quantize(jnp.ones((4, 128)))}, r"got \(4, 128\) and \(2, 8, "),
        (
            {"lhs": fp8jax.quantize(jnp.ones((4, 256)), fp8jax.BLOCK_128X128)},
            r"span two groups, got lhs.tile=\(128, 128\)",
        ),
        ({"out_dtype": jnp.int8}, "out_dtype bfloat16, float16 or float32, got"),
    ],
)
def test_bad_input_of_grouped_matmul_is_named(change, message):
    call = {
        "lhs": fp8jax.quantize(jnp.ones((4, 256))),
        "rhs": fp8jax.quantize(jnp.ones((2, 8, 256)), fp8jax.BLOCK_128X128),
        "group_sizes": jnp.ones(2, jnp.int32),
    }
    with pytest.raises(ValueError, match=f"grouped_matmul .*{message}"):
        matmul.grouped_matmul(**call | change)


def test_bad_input_of_the_others_is_named():
    x, sizes = jnp.ones((8, 256)), jnp.ones(2, jnp.int32)
    q = fp8jax.quantize(x)
    with pytest.raises(ValueError, match=r"float32\(8, 8\) for float32\(2, 8, 8\)"):
        matmul.grouped_wgrad(q, q, sizes, accumulate=jnp.ones((8, 8)))
    odd = fp8jax.quantize(jnp.ones((8, 200)))
    with pytest.raises(ValueError, match=r"whole tiles of 128 .* got 200 columns"):
        matmul.grouped_wgrad(odd, odd, sizes)
    with pytest.raises(ValueError, match=r"a matrix \[m, k\], got x.shape=\(1, 8, "):
        quant.quantize_grouped(x[None], sizes)
    with pytest.raises(ValueError, match=r"got spec_t.tile=\(128, 1\)"):
        quant.quantize_grouped(x, sizes, spec_t=fp8jax.TILE_128X1)
    with pytest.raises(ValueError, match="quantize_grouped takes group_sizes as int32"):
        quant.quantize_grouped(x, jnp.ones(2))
