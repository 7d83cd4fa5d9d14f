"""Quantized values as an array, with the identity's derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fp8jax
from fp8jax.testing import quantize_numpy

E5M2 = jnp.float8_e5m2
SPECS = [
    fp8jax.TILE_1X128,
    fp8jax.BLOCK_128X128,
    fp8jax.QuantSpec((128, 1), scale="fp32"),
    fp8jax.QuantSpec((1, 32), dtype=E5M2),
    fp8jax.QuantSpec((1, 128), eps=100.0),
]


def normal(shape=(200, 300), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-9, 9, (*shape[:-1], 1)))
    return jnp.asarray(rng.normal(size=shape) * rows, dtype)


def decoded(x, spec):
    """By the oracle, float64; of `quantize`'s codes where a tie may fall either way."""
    if spec.scale == "pow2":
        data, scale = quantize_numpy(
            np.asarray(x, np.float32), spec.tile, dtype=spec.dtype, eps=spec.eps
        )
    else:
        q = fp8jax.quantize(x, spec)
        data, scale = np.asarray(q.data), np.asarray(q.scale)
    m, k = x.shape
    scale = np.repeat(np.repeat(scale, spec.tile[0], 0), spec.tile[1], 1)[:m, :k]
    return data.astype(np.float64) * scale


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_values_are_the_codes_values_in_the_dtype_of_x(spec, dtype, wrap):
    x = normal(dtype=dtype)
    # What reads it in float32 tempts XLA to drop the rounding to 16 bits.
    both = wrap(lambda x: (y := fp8jax.fake_quantize(x, spec), y.astype(jnp.float32)))
    got, wide = both(x)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    expected = np.float32(decoded(x, spec)).astype(dtype)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(wide, expected.astype(np.float32))
    # Few values are codes' already; that they changed is the point.
    assert (np.asarray(got) != np.asarray(x)).mean() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_values_are_quantized_in_a_program_for_a_gpu(implementation, dtype):
    x = normal(dtype=dtype)
    run = jax.jit(lambda x: fp8jax.fake_quantize(x, implementation=implementation) - x)
    expected = np.float32(decoded(x, fp8jax.TILE_1X128)).astype(dtype) - np.asarray(x)
    np.testing.assert_array_equal(run(x), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradient_goes_straight_through_in_the_dtype_of_x(dtype):
    x, dy = normal(dtype=dtype), normal(dtype=dtype, seed=1)

    def loss(x):
        return (fp8jax.fake_quantize(x) * dy).sum()

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        got = jax.grad(wrap(loss))(x)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, dy)


def test_gradient_of_a_mean_is_no_zero():
    x = normal((1024, 1024))
    got = jax.grad(lambda x: fp8jax.fake_quantize(x).mean())(x)
    np.testing.assert_array_equal(got, np.full(x.shape, 2.0**-20, np.float32))


def test_forward_mode_is_the_identity_too():
    x, tangent = normal(), normal(seed=1)
    y, dy = jax.jvp(fp8jax.fake_quantize, (x,), (tangent,))
    np.testing.assert_array_equal(y, fp8jax.fake_quantize(x))
    np.testing.assert_array_equal(dy, tangent)
    y, linear = jax.linearize(fp8jax.fake_quantize, x)
    np.testing.assert_array_equal(linear(tangent), tangent)


def test_second_derivative_is_the_rest_of_the_function_s():
    # loss = sum(q^2): its gradient 2 q, and that one's 2, straight through both.
    x = normal((2, 4))
    gradient = jax.grad(lambda x: (fp8jax.fake_quantize(x) ** 2).sum())
    got = jax.grad(lambda x: gradient(x).sum())(x)
    np.testing.assert_array_equal(got, np.full(x.shape, 2.0, np.float32))


def test_maps_over_batches_and_scans():
    x = normal((3, 64, 256))
    expected = jnp.stack([fp8jax.fake_quantize(matrix) for matrix in x])
    for got in (
        fp8jax.fake_quantize(x),
        jax.vmap(fp8jax.fake_quantize)(x),
        jax.lax.map(fp8jax.fake_quantize, x),
    ):
        np.testing.assert_array_equal(got, expected)
    gradient = jax.vmap(jax.grad(lambda x: (fp8jax.fake_quantize(x) * x).sum()))(x)
    np.testing.assert_array_equal(gradient, expected + x)


def test_a_nan_makes_its_tile_nan_and_no_gradient():
    x = normal((2, 256)).at[0, 3].set(jnp.nan)
    y, gradient = jax.value_and_grad(lambda x: fp8jax.fake_quantize(x).sum())(x)
    assert jnp.isnan(y)
    np.testing.assert_array_equal(gradient, jnp.ones_like(x))
    is_nan = np.isnan(fp8jax.fake_quantize(x))
    assert is_nan[0, :128].all()
    assert is_nan.sum() == 128


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_have_the_same_values_and_gradients(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    x = normal((256, 512))
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec("data"))
        placed = jax.device_put(x, where)
        y = jax.jit(fp8jax.fake_quantize)(placed)
        loss = jax.jit(jax.grad(lambda x: (fp8jax.fake_quantize(x) ** 2).sum()))
        gradient = loss(placed)
    expected = fp8jax.fake_quantize(x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gradient, 2 * expected)
    assert y.sharding.is_equivalent_to(where, 2)
    assert gradient.sharding.is_equivalent_to(where, 2)


def test_fp8_transform_leaves_it_as_it_is():
    x, w = normal((128, 256)), normal((256, 128), seed=1)

    def loss(params, x):
        return (x @ fp8jax.fake_quantize(params["w"], fp8jax.BLOCK_128X128)).sum()

    params = {"w": w}
    forward = fp8jax.fp8_transform(loss)
    assert [row.status for row in forward.report(params, x).rows] == ["fp8"]
    step = jax.value_and_grad(loss)
    whole = fp8jax.fp8_transform(step)
    rows = whole.report(params, x).rows
    assert {row.role: row.status for row in rows} == {"fprop": "fp8", "wgrad": "fp8"}
    for one, other in zip(
        jax.tree.leaves(whole(params, x)),
        jax.tree.leaves(jax.value_and_grad(forward)(params, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_float64_is_rounded_to_float32_first():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)))
        y, gradient = jax.value_and_grad(lambda x: fp8jax.fake_quantize(x).sum())(x)
        assert y.dtype == gradient.dtype == jnp.float64
        got = fp8jax.fake_quantize(x)
        np.testing.assert_array_equal(got, decoded(x, fp8jax.TILE_1X128))


@pytest.mark.parametrize(
    ("x", "spec", "message"),
    [
        (jnp.ones((4, 128), jnp.float8_e4m3fn), SPECS[0], "got dtype float8_e4m3fn"),
        (jnp.ones((4, 128), jnp.int32), SPECS[0], "got dtype int32"),
        (jnp.ones(128), SPECS[0], r"fake_quantize takes an array .*x.shape=\(128,\)"),
        (jnp.ones((4, 128)), "1x128", "fake_quantize takes a QuantSpec, got '1x128'"),
    ],
)
def test_what_it_cannot_take_is_named(x, spec, message):
    with pytest.raises(ValueError, match=message):
        fp8jax.fake_quantize(x, spec)
