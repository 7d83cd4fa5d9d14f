"""dot_general's values and gradients against float32 autodiff and bit-exact parts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import numerics, ops, recipes
from fp8jax.testing import lognormal_tokens

DIMS = (((1,), (0,)), ((), ()))  # x [m, k] times w [k, n]
PRESETS = {
    "deepseek_v3": recipes.deepseek_v3(),
    "deepseek_v3 fp32": recipes.deepseek_v3("fp32"),
    "fp8 residual": recipes.deepseek_v3(residual="fp8"),
    "blocked_wgrad": recipes.blocked_wgrad(),
    "blocked_wgrad fp8 residual": recipes.blocked_wgrad(residual="fp8"),
    "bf16_wgrad": recipes.bf16_wgrad(),
}
EACH_PRESET = pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)


def arrays(*shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal(shape, "f")).astype(dtype) for shape in shapes
    )


def with_gradients(dot, lhs, rhs, dout):
    out, vjp = jax.vjp(dot, lhs, rhs)
    return out, *vjp(dout.astype(out.dtype))


def layer(m=192, k=300, n=257, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(lognormal_tokens(rng, (m, k))).astype(dtype)
    w = jnp.asarray(rng.standard_normal((k, n), "f") * 0.05).astype(dtype)
    return x, w, jnp.asarray(rng.standard_normal((m, n), "f")).astype(dtype)


def fp8_dot(recipe, dims=DIMS):
    return lambda x, w: fp8jax.dot_general(x, w, dims, recipe=recipe)


def dequantized(x, tile, recipe_scale="pow2"):
    spec = fp8jax.QuantSpec(tile, scale=recipe_scale)
    return fp8jax.quantize(x, spec).dequantize()


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_gradients_are_float32_autodiff_of_the_dequantized_operands(scale):
    x, w, dout = layer()
    y, dx, dw = with_gradients(fp8_dot(recipes.deepseek_v3(scale)), x, w, dout)
    q = functools.partial(dequantized, recipe_scale=scale)
    dot = functools.partial(jnp.dot, precision="highest")
    for actual, left, right in [
        (y, q(x, (1, 128)), q(w, (128, 128))),
        (dx, q(dout, (1, 128)), q(w, (128, 128)).T),
        (dw, q(x, (128, 1)).T, q(dout, (128, 1))),
    ]:
        # Both are float32 sums of the same products: k 2^-24 of the magnitudes each.
        bound = dot(jnp.abs(left), jnp.abs(right)) * (left.shape[1] + 3) * 2.0**-23
        assert jnp.all(jnp.abs(actual - dot(left, right)) <= bound)


@EACH_PRESET
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_25_db_of_the_unquantized_product_and_its_gradients(dtype, recipe):
    x, w, dout = layer(dtype=dtype)
    actual = with_gradients(fp8_dot(recipe), x, w, dout)
    expected = with_gradients(
        lambda x, w: jax.lax.dot_general(x, w, DIMS, precision="highest"),
        *(a.astype(jnp.float32) for a in (x, w, dout)),
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # A code's error is even over a step, 2^-3 of itself at most: an rms of 2^-3 /
        # sqrt(12), 28.8 dB, and 25.8 dB of two operands.
        assert numerics.sqnr_db(a, e) > 25


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_each_gemm_is_the_product_of_its_own_tiles_bit_for_bit(scale):
    x, w, dout = layer()
    y, dx, dw = with_gradients(fp8_dot(recipes.deepseek_v3(scale)), x, w, dout)
    tile = fp8jax.QuantSpec((1, 128), scale=scale)
    block = fp8jax.QuantSpec((128, 128), scale=scale)
    product = functools.partial(fp8jax.scaled_matmul, out_dtype=jnp.float32)
    quantize = fp8jax.quantize
    np.testing.assert_array_equal(y, product(quantize(x, tile), quantize(w.T, block)))
    np.testing.assert_array_equal(dx, product(quantize(dout, tile), quantize(w, block)))
    np.testing.assert_array_equal(
        dw, product(quantize(x.T, tile), quantize(dout.T, tile))
    )
    if scale == "pow2":
        return  # Another tile's power of two gives most products the same bits.
    # Wrong tiles must show: x along channels in wgrad, W in rows, dout along n.
    wrong_x = quantize(quantize(x, tile).dequantize().T, tile)
    assert not np.array_equal(dw, product(wrong_x, quantize(dout.T, tile)))
    assert not np.array_equal(y, product(quantize(x, tile), quantize(w.T, tile)))
    wrong_dout = quantize(quantize(dout, tile).dequantize().T, tile)
    assert not np.array_equal(dw, product(quantize(x.T, tile), wrong_dout))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("dims", [DIMS, (((1,), (1,)), ((), ()))])
def test_fp8_residuals_change_no_bit(dims, scale):
    x, w, dout = layer()
    w = w if dims == DIMS else w.T
    kept, codes = (
        with_gradients(
            fp8_dot(recipes.deepseek_v3(scale, residual=residual), dims), x, w, dout
        )
        for residual in ("bf16", "fp8")
    )
    chex.assert_trees_all_equal(codes, kept)


@pytest.mark.parametrize("dims", [DIMS, (((1,), (1,)), ((), ()))])
def test_fp8_residuals_change_no_bit_of_products_that_may_be_split(dims):
    x, w, dout = layer()
    w = w if dims == DIMS else w.T
    kept, codes = (
        with_gradients(
            fp8_dot(recipes.deepseek_v3(residual=residual), dims), x, w, dout
        )
        for residual in ("bf16", "fp8")
    )
    chex.assert_trees_all_equal(codes, kept)


@pytest.mark.usefixtures("one_device")
def test_codes_for_two_products_come_from_one_read():
    x, w, dout = layer()

    def reads(recipe):
        jaxpr = jax.make_jaxpr(functools.partial(with_gradients, fp8_dot(recipe)))
        return str(jaxpr(x, w, dout)).count("name=fp8jax::quantize_both_xla")

    assert reads(recipes.deepseek_v3()) == 1  # dout
    assert reads(recipes.deepseek_v3(residual="fp8")) == 3  # x, W and dout
    assert reads(recipes.bf16_wgrad()) == 0


def test_fp8_residuals_halve_what_the_forward_pass_keeps():
    x, w, _ = layer(m=512, k=256, n=256, dtype=jnp.bfloat16)

    def kept(recipe):
        _, vjp = jax.eval_shape(lambda x, w: jax.vjp(fp8_dot(recipe), x, w), x, w)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(vjp))

    bf16 = kept(recipes.deepseek_v3())
    assert bf16 == x.nbytes + w.nbytes
    # A byte for two, and a float32 scale for 128 of them: 0.516.
    assert kept(recipes.deepseek_v3(residual="fp8")) < 0.55 * bf16


@pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "dims"),
    [
        ((2, 5, 160), (160, 130), (((2,), (0,)), ((), ()))),
        ((2, 5, 160), (130, 160), (((2,), (1,)), ((), ()))),
        ((160, 7), (160, 130), (((0,), (0,)), ((), ()))),
        ((3, 8, 20, 4), (20, 4, 6), (((2, 3), (0, 1)), ((), ()))),
        ((3, 8, 20, 4), (4, 6, 20), (((3, 2), (0, 2)), ((), ()))),
        ((3, 8, 160), (3, 160, 9), (((2,), (1,)), ((0,), (0,)))),
        ((8, 3, 160, 2), (2, 160, 9, 3), (((2,), (1,)), ((1, 3), (3, 0)))),
        ((160,), (160, 6), (((0,), (0,)), ((), ()))),
        ((160,), (160,), (((0,), (0,)), ((), ()))),
        ((2, -1 + 161), (160, 6), (((-1,), (0,)), ((), ()))),
    ],
)
def test_any_dimension_numbers_give_lax_s_result(lhs_shape, rhs_shape, dims):
    lhs, rhs = arrays(lhs_shape, rhs_shape)
    lax_dims = jax.tree.map(int, dims)
    if dims[0][0] == (-1,):
        lax_dims = (((1,), (0,)), ((), ()))
    expected = jax.lax.dot_general(lhs, rhs, lax_dims, precision="highest")
    dout = arrays(expected.shape, seed=1)[0]
    actual = with_gradients(fp8_dot(None, dims), lhs, rhs, dout)
    reference = with_gradients(
        lambda x, w: jax.lax.dot_general(x, w, lax_dims, precision="highest"),
        lhs,
        rhs,
        dout,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, reference)
    for a, e in zip(actual, reference, strict=True):
        if e.size > 1:  # A single sum may cancel.
            # 25.8 dB as above on average; these sums are few, so as in all of one size
            # a half more, 3.5 dB, is let pass.
            assert numerics.sqnr_db(a, e) > 22


def test_batch_dimensions_are_products_one_by_one():
    x, w = arrays((3, 40, 160), (3, 160, 50))
    dims = (((2,), (1,)), ((0,), (0,)))
    out = fp8_dot(None, dims)(x, w)
    for i in range(3):
        one = fp8_dot(None)(x[i], w[i])
        assert numerics.sqnr_db(out[i], one) > 120  # Same codes, summed in float32.


@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_preferred_element_type_is_the_result_s(dtype, preferred):
    x, w, _ = layer(dtype=dtype)
    out = fp8jax.dot_general(x, w, DIMS, preferred_element_type=preferred)
    assert out.dtype == (dtype if preferred is None else preferred)
    gradient = jax.grad(
        lambda x: (
            fp8jax.dot_general(x, w, DIMS, preferred_element_type=preferred)
            .astype(jnp.float32)
            .sum()
        )
    )(x)
    assert gradient.dtype == dtype


def test_mixed_operand_dtypes_promote_as_lax_does():
    x, w, _ = layer()
    with jax.numpy_dtype_promotion("standard"):
        out = fp8jax.dot_general(x.astype(jnp.bfloat16), w, DIMS)
    assert out.dtype == jnp.float32


def test_bf16_recipe_is_lax_bit_for_bit():
    x, w, dout = layer(dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(
        with_gradients(fp8_dot(recipes.bf16()), x, w, dout),
        with_gradients(lambda x, w: jax.lax.dot_general(x, w, DIMS), x, w, dout),
    )


def test_bf16_wgrad_leaves_the_weight_gradient_as_lax_computes_it():
    x, w, dout = layer(dtype=jnp.bfloat16)
    _, dx, dw = with_gradients(fp8_dot(recipes.bf16_wgrad()), x, w, dout)
    _, plain_dx, plain_dw = with_gradients(
        lambda x, w: jax.lax.dot_general(x, w, DIMS), x, w, dout
    )
    np.testing.assert_array_equal(dw, plain_dw)
    assert not np.array_equal(dx, plain_dx)


@EACH_PRESET
def test_jit_remat_scan_and_vmap_differentiate(recipe):
    x, w, _ = layer(m=8, k=130, n=130)
    ws = jnp.stack([w, w + np.float32(0.1)])

    def stack(x, ws, body):
        return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].sum()

    body = fp8_dot(recipe)
    plain = jax.grad(stack, (0, 1))(x, ws, body)
    jitted = jax.jit(jax.grad(stack, (0, 1)), static_argnums=2)
    for other in (body, jax.checkpoint(body)):
        for a, e in zip(jitted(x, ws, other), plain, strict=True):
            # Same codes, summed in float32: 2^-20.
            assert numerics.sqnr_db(a, e) > 120
    mapped = jax.vmap(jax.grad(lambda x, w: body(x, w).sum(), (0, 1)), (None, 0))
    assert mapped(x, ws)[1].shape == ws.shape


def test_quantized_dot_is_dot_general_s_forward_and_takes_the_weight_on_either_side():
    x, w, _ = layer()
    tile, block = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    y = fp8_dot(None)(x, w)
    np.testing.assert_array_equal(ops.quantized_dot(x, w, DIMS, tile, block), y)
    flipped = ops.quantized_dot(w, x, (((0,), (1,)), ((), ())), block, tile)
    np.testing.assert_array_equal(flipped.T, y)


def test_quantized_dot_refuses_differentiation_and_says_what_to_use():
    x, w, _ = layer(m=4, k=8, n=4)
    specs = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    with pytest.raises(TypeError, match=r"fp8jax\.dot_general, whose gradients"):
        jax.grad(lambda x: ops.quantized_dot(x, w, DIMS, *specs).sum())(x)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()),
        jax.hessian,
        lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
        lambda f: jax.jacrev(jax.grad(f)),
    ],
    ids=["grad of grad", "hessian", "jvp of grad", "jacrev of grad"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_second_derivatives_are_refused_and_not_wrong(wrap, derivative):
    _, w, _ = layer(m=4, k=8, n=4)

    def f(x):
        return (fp8jax.dot_general(x, w, DIMS) ** 2).sum()

    with pytest.raises(TypeError, match=r"second derivative|forward-mode"):
        wrap(derivative(f))(jnp.ones((4, 8)))


def test_trains_on_a_sharded_batch():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), ("data",))
    x, w, _ = layer(m=256, k=256, n=128)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    step = jax.jit(jax.value_and_grad(lambda w, x: (fp8_dot(None)(x, w) ** 2).mean()))
    loss, grad = step(w, x)
    sharded_loss, sharded_grad = step(w, jax.device_put(x, rows))
    # Float32 sums over devices, in another order: some ulps. With the last bits of y,
    # its gradient's codes at ties move: by 2^-3, and 2^-10 of the whole if one in 2^14
    # does.
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    assert numerics.sqnr_db(sharded_grad, grad) > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lhs": jnp.ones((4, 129))},
            r"contracts .* got \(129,\) of lhs.shape=\(4, 129",
        ),
        ({"rhs": jnp.ones((128, 4), jnp.int32)}, "float32 arrays, got rhs.dtype=int32"),
        (
            {"dimension_numbers": (((5,), (0,)), ((), ()))},
            "as jax.lax.dot_general does",
        ),
        ({"dimension_numbers": "ij,jk"}, "as jax.lax.dot_general does.*'ij,jk'"),
        ({"recipe": "deepseek"}, "takes a Recipe or None, got recipe='deepseek'"),
        ({"preferred_element_type": jnp.int32}, "preferred_element_type .*got int32"),
        ({"implementation": "cuda"}, "'cuda' is not known"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"lhs": jnp.ones((4, 128)), "rhs": jnp.ones((128, 4))}
    with pytest.raises(ValueError, match=message):
        fp8jax.dot_general(**{"dimension_numbers": DIMS} | call | change)


def test_out_sharding_in_fp8_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="with_sharding_constraint"):
        fp8jax.dot_general(
            jnp.ones((4, 128)), jnp.ones((128, 4)), DIMS, out_sharding=object()
        )


def test_recipes_are_static_and_changes_are_new_recipes():
    recipe = recipes.deepseek_v3()
    assert hash(recipe) == hash(recipes.deepseek_v3("pow2"))
    no_dgrad = dataclasses.replace(recipe, dgrad=None)
    x, w, dout = layer()
    _, dx, _ = with_gradients(fp8_dot(no_dgrad), x, w, dout)
    np.testing.assert_array_equal(dx, dout @ w.T)
