"""Codes that XLA may split: those of the whole array, wherever shards begin and end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import ops
from fp8jax._elementwise import Elementwise, Step

TILE, BLOCK = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
FP32 = fp8jax.QuantSpec(tile=(1, 128), scale="fp32")


def mesh(**axes):
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def normal(seed, *shape):
    # Rows of unlike sizes, so that scales of one tile would be wrong in another.
    x = jax.random.normal(jax.random.key(seed), shape)
    sizes = jax.random.randint(jax.random.key(seed + 1), shape, -12, 4)
    return x * jnp.exp2(sizes.astype(jnp.float32))


def operand(shape, contracted, batch=()):
    """Of a product that contracts these dimensions with all of another array's."""
    other = (*(shape[d] for d in batch), *(shape[d] for d in contracted))
    numbers = (
        (contracted, tuple(range(len(batch), len(other)))),
        (batch, tuple(range(len(batch)))),
    )
    return ops.plan(shape, other, numbers, "test").lhs


def whole_codes(x, how, way):
    """The codes of one device, as matrices."""
    contraction, spec = way
    matrix = how.arrange(x)
    turned = matrix if contraction == 1 else matrix.mT
    q = fp8jax.quantize(turned, spec)
    return q.data, q.scale


def same_codes(found, wanted):
    for (data, scale), (codes, scales) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(
            np.asarray(data).view(np.uint8).reshape(codes.shape),
            np.asarray(codes).view(np.uint8),
        )
        np.testing.assert_array_equal(np.asarray(scale).reshape(scales.shape), scales)


CASES = {
    # Shape, contracted dimensions, mesh, how it is split.
    "rows": ((512, 256), (1,), {"x": 8}, P("x")),
    "contraction": ((512, 2048), (1,), {"x": 8}, P(None, "x")),
    "both sides": ((512, 1024), (1,), {"x": 2, "y": 4}, P("x", "y")),
    "one side by two axes": ((2048, 256), (1,), {"x": 2, "y": 4}, P(("y", "x"))),
    "tokens of sequences": ((8, 128, 256), (0, 1), {"x": 4, "y": 2}, P("x", None, "y")),
    "parts of sequences": ((2, 1024, 256), (0, 1), {"x": 2, "y": 4}, P("x", "y")),
    "tiles cut in halves": ((256, 704 * 8), (1,), {"x": 8}, P(None, "x")),
    "rows of blocks cut": ((704 * 8, 256), (1,), {"x": 8}, P("x")),
    "blocks cut on both sides": ((96 * 4, 320), (1,), {"x": 4, "y": 2}, P("x", "y")),
    "shards shorter than tiles": ((64, 512), (1,), {"x": 8}, P(None, "x")),
    "an end that is no tile": ((200, 1000), (1,), {"x": 8}, P("x", None)),
    "an end that is no tile, cut": ((200, 1000), (1,), {"x": 8}, P(None, "x")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "specs", [(TILE, None), (BLOCK, None), (FP32, None), (TILE, TILE), (BLOCK, BLOCK)]
)
def test_codes_are_those_of_the_whole_array(case, specs):
    shape, contracted, axes, spec = case
    how = operand(shape, contracted)
    ways = tuple(
        (side, fmt)
        for side, fmt in zip((how.contraction, 1 - how.contraction), specs, strict=True)
        if fmt is not None
    )
    x = normal(0, *shape)
    wanted = [whole_codes(x, how, way) for way in ways]
    run = jax.jit(lambda x: ops.split_codes(how, (ways,), [x], None))
    same_codes(run(x), wanted)
    sharded = jax.device_put(x, NamedSharding(mesh(**axes), spec))
    same_codes(run(sharded), wanted)


@pytest.mark.parametrize("size", [2048, 704 * 8])
def test_nothing_is_gathered_but_maxima_of_tiles_that_are_cut(size):
    how = operand((size, 256), (0,))
    ways = (((0, BLOCK), (1, BLOCK)),)
    where = NamedSharding(mesh(x=8), P("x"))
    run = jax.jit(lambda x: ops.split_codes(how, ways, [x], None))
    x = jax.ShapeDtypeStruct((size, 256), jnp.bfloat16, sharding=where)
    compiled = run.lower(x).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert ("all-reduce" in text) == (size % 1024 > 0)
    (data, _), (data_t, _) = compiled.output_shardings
    assert data.is_equivalent_to(NamedSharding(where.mesh, P(None, "x")), 2)
    assert data_t.is_equivalent_to(where, 2)


def test_a_nan_in_a_cut_tile_is_in_every_shard_of_it():
    shape = (128, 704 * 8)
    how = operand(shape, (1,))
    x = normal(0, *shape).at[5, 704].set(jnp.nan)  # In the tile from 640 to 767.
    wanted = [whole_codes(x, how, (1, TILE))]
    assert np.isnan(np.asarray(wanted[0][0][5, 640:768], np.float32)).all()
    run = jax.jit(lambda x: ops.split_codes(how, (((1, TILE),),), [x], None))
    same_codes(run(jax.device_put(x, NamedSharding(mesh(x=8), P(None, "x")))), wanted)


F32 = np.dtype(np.float32)
GATED = Elementwise(
    kinds=("matrix", "matrix", "rows", "columns"),
    dtypes=(F32,) * 4,
    steps=(
        Step("logistic", (0,), F32),
        Step("mul", (4, 1), F32),
        Step("mul", (5, 2), F32),
        Step("mul", (6, 3), F32),
    ),
    results=(5, 7),
)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((8, 256, 1), (1, 1, 512)), ((8, 256), (512,)), ((8, 256, 1), (1, 512))],
)
@pytest.mark.parametrize("spec", [P("x"), P("x", "y"), P(None, "x", "y")])
@pytest.mark.parametrize("features", [512])
def test_values_that_are_computed_have_the_codes_of_the_values(
    rows, columns, spec, features
):
    shape = (8, 256, features)
    how = operand(shape, (2,))
    a, b = (normal(i, *shape) for i in (0, 2))
    r, c = normal(4, *rows), normal(6, *columns)
    ways = ((1, TILE), (0, TILE)), ((1, BLOCK),)
    full = a, b, r.reshape(8, 256, 1), c.reshape(1, 1, features)
    values = jax.jit(GATED)(*full)
    wanted = [
        whole_codes(x, how, way)
        for x, several in zip(values, ways, strict=True)
        for way in several
    ]
    run = jax.jit(lambda *inputs: ops.split_codes(how, ways, inputs, None, GATED))
    same_codes(run(a, b, r, c), wanted)
    here = mesh(x=4, y=2)
    split = NamedSharding(here, spec)
    inputs = jax.device_put(a, split), jax.device_put(b, split), r, c
    same_codes(run(*inputs), wanted)


def test_values_that_are_computed_of_shards_that_cut_tiles():
    how = operand((640, 256), (0,))
    a, b = (normal(i, 640, 256) for i in (0, 2))
    r, c = normal(4, 640, 1), normal(6, 1, 256)
    ways = ((0, TILE),), ((0, TILE), (1, TILE))
    wanted = [
        whole_codes(x, how, way)
        for x, several in zip(jax.jit(GATED)(a, b, r, c), ways, strict=True)
        for way in several
    ]
    run = jax.jit(lambda *inputs: ops.split_codes(how, ways, inputs, None, GATED))
    split = NamedSharding(mesh(x=8), P("x"))
    same_codes(run(*(jax.device_put(x, split) for x in (a, b, r)), c), wanted)


@pytest.mark.parametrize("batch", [0, 1])
def test_mapped_quantization_is_that_of_each(batch):
    x = normal(0, 3, 512, 704 * 8)
    how = operand(x.shape[1:], (1,))
    x = jnp.moveaxis(x, 0, batch)
    one = functools.partial(ops.split_codes, how, (((1, BLOCK),),), implementation=None)
    run = jax.jit(jax.vmap(lambda x: one(inputs=[x]), in_axes=batch))
    spec = P(*(None if d != x.ndim - 1 else "x" for d in range(x.ndim)))
    ((data, scale),) = run(jax.device_put(x, NamedSharding(mesh(x=8), spec)))
    for i in range(3):
        wanted = [whole_codes(jnp.take(x, i, batch), how, (1, BLOCK))]
        same_codes([(data[i], scale[i])], wanted)


NN = (((1,), (0,)), ((), ()))
PRODUCTS = {
    # Shapes, dimension numbers, and which dimension of each is split in eight.
    "data": ((1024, 256), (256, 384), NN, 0, None),
    "fsdp": ((1024, 2048), (2048, 384), NN, 0, 0),
    "a side cut": ((1024, 5632), (5632, 256), NN, 0, 0),
    "tensor": ((512, 2048), (2048, 256), NN, 1, 0),
    "sequences": ((8, 128, 256), (256, 384), (((2,), (0,)), ((), ())), 0, None),
    "wgrad": ((8, 128, 256), (8, 128, 384), (((0, 1), (0, 1)), ((), ())), 0, 0),
    "batches": ((8, 256, 128), (8, 128, 256), (((2,), (1,)), ((0,), (0,))), 0, 0),
}


def split_in_eight(x, dim):
    spec = P(*("x" if d == dim else None for d in range(x.ndim)))
    return jax.device_put(x, NamedSharding(mesh(x=8), spec))


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("tiles", [(TILE, BLOCK), (TILE, TILE), (BLOCK, TILE)])
def test_products_are_those_of_one_device(case, tiles):
    lhs_shape, rhs_shape, numbers, lhs_dim, rhs_dim = case
    layout = ops.plan(lhs_shape, rhs_shape, numbers, "test")
    x, w = normal(0, *lhs_shape), normal(2, *rhs_shape)

    def product(x, w):
        (lhs,), (rhs,) = (
            ops.split_codes(how, (((how.contraction, spec),),), [v], None)
            for how, spec, v in zip(
                (layout.lhs, layout.rhs), tiles, (x, w), strict=True
            )
        )
        sides = tiles[0].tile, tiles[1].tile
        return ops.multiply_split(lhs, rhs, layout, sides, np.dtype("float32"), None)

    wanted = ops.quantized_dot(x, w, numbers, *tiles)
    found = jax.jit(product)(split_in_eight(x, lhs_dim), split_in_eight(w, rhs_dim))
    assert found.shape == wanted.shape
    # The same codes: sums of k products in another order move by k 2^-24 of the sum of
    # their magnitudes at most.
    size = ops.quantized_dot(abs(x), abs(w), numbers, *tiles)
    k = layout.lhs.shape[-1 if layout.lhs.contraction == 1 else -2]
    np.testing.assert_array_less(abs(found - wanted), k * 2.0**-24 * size + 1e-30)


def test_codes_and_products_refuse_derivatives():
    how = operand((128, 256), (1,))

    def codes(x):
        ((_, scale),) = ops.split_codes(how, (((1, TILE),),), [x], None)
        return scale.sum()

    with pytest.raises(TypeError, match="quantized_dot has no gradient"):
        jax.grad(codes)(normal(0, 128, 256))


@pytest.mark.parametrize(
    ("shape", "contracted", "spec", "fits"),
    [
        ((8, 100, 256), (0, 1), TILE, False),  # Tiles reach from a row into the next.
        ((8, 100, 256), (2,), TILE, True),
        ((8, 100, 256), (2,), BLOCK, False),
        ((100, 300), (1,), BLOCK, True),
        ((0, 300), (1,), BLOCK, False),
        ((300,), (0,), TILE, False),
    ],
)
def test_which_operands_have_split_codes(shape, contracted, spec, fits):
    assert ops.has_split_codes(operand(shape, contracted), shape, spec) == fits
