"""Layers whose kernel is a QTensor, in NNX and in Linen alike."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from benchmarks import inference
from fp8jax import _compat, _dispatch, recipes

IN, OUT = 200, 160  # No multiples of a tile.
SPEC = fp8jax.QuantSpec(tile=(128, 128), scale="fp32")


@pytest.fixture
def params():
    k = jax.random.split(jax.random.key(0))
    kernel = fp8jax.quantize(jax.random.normal(k[0], (IN, OUT)), SPEC)
    return {"kernel": kernel, "bias": jax.random.normal(k[1], (OUT,))}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, IN))


def by_nnx(params, x, **options):
    use_bias = params["bias"] is not None
    layer = fp8jax.nnx.Linear(IN, OUT, rngs=nnx.Rngs(0), use_bias=use_bias, **options)
    nnx.update(layer, {k: v for k, v in params.items() if v is not None})
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def by_linen(params, x, **options):
    use_bias = params["bias"] is not None
    layer = fp8jax.linen.Dense(OUT, use_bias=use_bias, **options)
    variables = {"params": {k: v for k, v in params.items() if v is not None}}
    return jax.jit(layer.apply)(variables, x)


both = pytest.mark.parametrize("apply", [by_nnx, by_linen])


@both
@pytest.mark.parametrize("recipe", [None, recipes.deepseek_v3(scale="fp32")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_is_the_product_of_the_codes(params, x, apply, recipe, dtype, use_bias):
    spec = fp8jax.TILE_1X128
    if recipe is not None:
        spec = recipe.fprop.lhs
    params = params if use_bias else {**params, "bias": None}

    @jax.jit
    def expected(params, x):
        q = fp8jax.quantize(x.astype(dtype).reshape(-1, IN), spec)
        y = fp8jax.scaled_matmul(q, params["kernel"].T, out_dtype=dtype)
        y = y.reshape(2, 5, OUT)
        return y + params["bias"].astype(dtype) if use_bias else y

    y = apply(params, x, recipe=recipe, dtype=dtype)
    assert y.dtype == dtype
    chex.assert_trees_all_equal(y, expected(params, x))


@both
def test_is_close_to_the_product_of_the_values(params, x, apply):
    exact = x @ params["kernel"].dequantize() + params["bias"]
    error = fp8jax.numerics.relative_error(apply(params, x), exact)
    assert error < 2**-4  # A code's largest rounding error; that of a sum is less.


@both
def test_a_vector_is_one_row(params, x, apply):
    # The same codes: 200 float32 products, which XLA may add in another order for one
    # row: some ulps.
    chex.assert_trees_all_close(
        apply(params, x[0, 0]), apply(params, x)[0, 0], rtol=1e-6
    )


def test_program_is_given_one_byte_a_weight(params, x):
    layer = fp8jax.linen.Dense(OUT)
    lowered = jax.jit(layer.apply).lower({"params": params}, x)
    memory = lowered.compile().memory_analysis()
    arguments = params["kernel"].nbytes + params["bias"].nbytes + x.nbytes
    assert memory.argument_size_in_bytes <= arguments + 64


@both
def test_refusals_name_the_layer(params, x, apply):
    with pytest.raises(ValueError, match=r"fp8jax\.(nnx|linen).*no .*of yours"):
        apply(params, x, dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="whose fprop is in FP8"):
        apply(params, x, recipe=recipes.bf16())
    with pytest.raises(ValueError, match=r"\(2, 5, 199\) and \(200, 160\)"):
        apply(params, x[..., 1:])
    with pytest.raises(TypeError, match="has no gradient of that QTensor's codes"):
        jax.grad(lambda params: apply(params, x).sum())(params)
    with pytest.raises(TypeError, match=r"fp8jax\.(nnx|linen).* no second derivative"):
        jax.hessian(lambda x: apply(params, x).sum())(x)


@both
def test_gradient_of_the_input_is_the_product_of_the_codes(params, x, apply):
    dy = jax.random.normal(jax.random.key(8), (*x.shape[:-1], OUT))
    _, vjp = jax.vjp(lambda x: apply(params, x), x)
    q = fp8jax.quantize(dy.reshape(-1, OUT))
    expected = fp8jax.scaled_matmul(q, params["kernel"], out_dtype=x.dtype)
    chex.assert_trees_all_equal(vjp(dy)[0], expected.reshape(x.shape))


@both
def test_gradient_that_the_codes_cannot_give_is_that_of_their_values(params, x, apply):
    # Tiles of one column: none of 128 along the features that dgrad contracts.
    spec = fp8jax.QuantSpec(tile=(128, 1), scale="fp32")
    columns = fp8jax.quantize(params["kernel"].dequantize(), spec)
    grads = [jax.grad(lambda x: apply({**params, "kernel": columns}, x).sum())(x)]
    by_rule = {"recipe": dataclasses.replace(recipes.deepseek_v3(), dgrad=None)}
    grads += [jax.grad(lambda x: apply(params, x, **by_rule).sum())(x)]
    for kernel, got in zip((columns, params["kernel"]), grads, strict=True):
        expected = jnp.ones((*x.shape[:-1], OUT)) @ kernel.dequantize().T
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_linen_checks_the_kernels_features(params, x):
    with pytest.raises(ValueError, match=r"features=7 got a QTensor.*\(200, 160\)"):
        fp8jax.linen.Dense(7).apply({"params": params}, x)


def test_nnx_layers_keep_their_qtensor_through_split_and_merge(params, x):
    layer = fp8jax.nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    merged = nnx.merge(*nnx.split(layer))
    assert isinstance(merged.kernel.get_value(), fp8jax.QTensor)
    np.testing.assert_array_equal(merged(x), layer(x))


HIDDEN = 256


@pytest.fixture
def mlp():
    k = jax.random.split(jax.random.key(2), 3)
    shapes = {"gate": (IN, HIDDEN), "up": (IN, HIDDEN), "down": (HIDDEN, IN)}
    return {
        name: {"kernel": fp8jax.quantize(jax.random.normal(key, shape) / 14, SPEC)}
        for key, (name, shape) in zip(k, shapes.items(), strict=True)
    }


def swiglu_by_nnx(params, x, **options):
    layer = fp8jax.nnx.SwiGLU(IN, HIDDEN, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, params)
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def swiglu_by_linen(params, x, **options):
    layer = fp8jax.linen.SwiGLU(HIDDEN, **options)
    return jax.jit(layer.apply)({"params": params}, x)


both_swiglus = pytest.mark.parametrize("apply", [swiglu_by_nnx, swiglu_by_linen])


@both_swiglus
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_swiglu_is_its_three_products(mlp, x, apply, dtype):
    @jax.jit
    def expected(params, x):
        def dot(q, name):
            kernel = params[name]["kernel"]
            return fp8jax.scaled_matmul(q, kernel.T, out_dtype=dtype)

        q = fp8jax.quantize(x.astype(dtype).reshape(-1, IN))
        gate, up = dot(q, "gate"), dot(q, "up")
        h = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return dot(fp8jax.quantize(h.astype(dtype)), "down").reshape(x.shape)

    y = apply(mlp, x, dtype=dtype)
    assert y.dtype == dtype
    # A code of h may move by a step where it lies at a tie: see quantize_swiglu.
    assert fp8jax.numerics.sqnr_db(expected(mlp, x), y) > 40


def scaled_by_one_quantization(layer, x, dtype):
    """The layer given codes, as against the layer given what they were made of."""
    q = fp8jax.quantize(x.astype(dtype))
    chex.assert_trees_all_equal(layer(q), layer(x.astype(dtype)))


@pytest.fixture
def block(params):
    scale = jax.random.normal(jax.random.key(3), (IN,))
    return {"norm": {"scale": scale}, "kernel": params["kernel"]}


def norm_by_nnx(block, x, **options):
    layer = fp8jax.nnx.RMSNormLinear(IN, OUT, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, {"norm": block["norm"], "linear": {"kernel": block["kernel"]}})
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def norm_by_linen(block, x, **options):
    layer = fp8jax.linen.RMSNormDense(OUT, **options)
    params = {"norm": block["norm"], "dense": {"kernel": block["kernel"]}}
    return jax.jit(layer.apply)({"params": params}, x)


both_norms = pytest.mark.parametrize("apply", [norm_by_nnx, norm_by_linen])


@both_norms
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_norm_is_the_product_of_its_codes(block, x, apply, dtype):
    @jax.jit
    def expected(block, x):
        wide = x.astype(dtype or x.dtype).astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        h = wide * jax.lax.rsqrt(mean + 1e-3) * block["norm"]["scale"]
        q = fp8jax.quantize(h.astype(dtype or x.dtype).reshape(-1, IN))
        y = fp8jax.scaled_matmul(q, block["kernel"].T, out_dtype=dtype or x.dtype)
        return y.reshape(2, 5, OUT)

    y = apply(block, x, dtype=dtype, epsilon=1e-3)
    assert y.dtype == (dtype or x.dtype)
    # A code of h may move by a step where it lies at a tie: see quantize_rms_norm.
    assert fp8jax.numerics.sqnr_db(expected(block, x), y) > 40


@both_norms
def test_norm_is_close_to_the_product_of_the_values(block, x, apply):
    wide = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    exact = (wide * block["norm"]["scale"]) @ block["kernel"].dequantize()
    error = fp8jax.numerics.relative_error(apply(block, x), exact)
    assert error < 2**-4  # A code's largest rounding error; that of a sum is less.


@both_norms
def test_norm_refusals_name_the_layer(block, x, apply):
    name = r"fp8jax\.(nnx\.RMSNormLinear|linen\.RMSNormDense)"
    with pytest.raises(ValueError, match=name + " with a QTensor .* whose fprop"):
        apply(block, x, recipe=recipes.bf16())
    for kernel in (block["kernel"], block["kernel"].dequantize()):
        with pytest.raises(ValueError, match=name + " normalizes its input: an array"):
            apply({**block, "kernel": kernel}, fp8jax.quantize(x), dtype=jnp.float32)
    with pytest.raises(TypeError, match=name + " .*has no gradient of that QTensor"):
        jax.grad(lambda block: apply(block, x).sum())(block)


@both_norms
def test_norm_s_gradients_are_those_of_the_norm_and_products_after_it(block, x, apply):
    def by_hand(scale, x):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale
        how = {"out_dtype": x.dtype}
        return fp8jax.ops.static_weight_dot("by hand", h, block["kernel"], **how)

    def layer(scale, x):
        return apply({**block, "norm": {"scale": scale}}, x)

    def grads_of(fn):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1))

    got, expected = (grads_of(fn)(block["norm"]["scale"], x) for fn in (layer, by_hand))
    # A code of h may move by a step where it lies at a tie, and so the cosine.
    for a, b in zip(got, expected, strict=True):
        assert fp8jax.numerics.sqnr_db(b, a) > 30


def test_norm_of_another_width_is_refused(block, x):
    with pytest.raises(
        ValueError, match=r"RMSNormLinear takes x.*\(2, 5, 199\), \(200"
    ):
        norm_by_nnx(block, x[..., 1:])


@both
def test_input_in_codes_is_the_input_it_was_made_of(params, x, apply):
    def layer(x):
        return apply(params, x, dtype=jnp.bfloat16)

    scaled_by_one_quantization(layer, x, jnp.bfloat16)
    scaled_by_one_quantization(layer, x[0], jnp.bfloat16)


@both_swiglus
def test_swiglu_takes_codes_of_its_input(mlp, x, apply):
    def layer(x):
        return apply(mlp, x, dtype=jnp.float32)

    scaled_by_one_quantization(layer, x, jnp.float32)


@both
def test_input_in_codes_needs_codes_of_the_kernel_and_a_dtype(params, x, apply):
    q = fp8jax.quantize(x)
    with pytest.raises(ValueError, match=r"takes a QTensor as its input.*dtype=None"):
        apply(params, q)
    plain = {**params, "kernel": params["kernel"].dequantize()}
    with pytest.raises(ValueError, match="takes a QTensor as its input"):
        apply(plain, q, dtype=jnp.float32)
    blocks = fp8jax.quantize(x, SPEC)
    with pytest.raises(ValueError, match="in tiles of one row"):
        apply(params, blocks, dtype=jnp.float32)


@both_swiglus
def test_swiglu_refuses_to_mix_codes_and_arrays(mlp, x, apply):
    mixed = {**mlp, "up": {"kernel": mlp["up"]["kernel"].dequantize()}}
    with pytest.raises(ValueError, match=r"QTensor \[200, 256\], array"):
        apply(mixed, x)


@both
def test_codes_that_lie_contraction_last_are_read_as_they_lie(params, x, apply):
    kernel = fp8jax.quant.contraction_minor(params["kernel"])
    np.testing.assert_array_equal(
        apply({**params, "kernel": kernel}, x), apply(params, x)
    )


def test_program_takes_codes_in_the_order_they_lie_in(params, x):
    layer = fp8jax.linen.Dense(OUT)
    kernel = fp8jax.quant.contraction_minor(params["kernel"])
    variables = {"params": {**params, "kernel": kernel}}
    hlo = jax.jit(layer.apply).lower(variables, x).compile().as_text()
    layouts = hlo.splitlines()[0]
    assert f"f8e4m3fn[{IN},{OUT}]{{0,1}}" in layouts
    assert "f32[2,2]{0,1}" in layouts


@pytest.fixture
def decoder():
    """Two layers of a 7B decoder at m = 1: a program and its arguments' types."""
    step = inference.Step(2, inference.SIZES, inference.FUSED)

    def codes(w):
        if w.ndim < 2:
            return w
        return jax.eval_shape(
            lambda w: fp8jax.quantize(w, SPEC, implementation="xla"), w
        )

    run, leaves = step.jit(jax.tree.map(codes, step.shapes))
    x = jax.ShapeDtypeStruct((1, inference.SIZES.width), jnp.bfloat16)
    weights = sum(w.size for w in jax.tree.leaves(step.shapes) if w.ndim == 2)
    return run, (leaves, x), weights


def test_layers_of_a_7b_model_are_given_a_byte_a_weight(decoder):
    run, arguments, weights = decoder
    assert weights == 2 * 4096 * (6144 + 4096 + 3 * 14336)
    with jax.numpy_dtype_promotion("standard"):
        memory = run.lower(*arguments).compile().memory_analysis()
    # Scales are 4 bytes in 16384; norms are 4 vectors in BF16.
    assert 0 <= memory.argument_size_in_bytes - weights * (1 + 4 / 16384) < 2**16


@pytest.mark.skipif(_compat.JAX_VERSION < (0, 11), reason="GPU kernels need JAX 0.11")
def test_layers_of_a_7b_model_inflate_no_weight_on_a_gpu(decoder, monkeypatch):
    run, arguments, _ = decoder
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    with jax.numpy_dtype_promotion("standard"):
        traced = run.trace(*arguments)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # As NumPy would count them: the smallest weight is 4096x4096.
    large = {
        kind
        for sides, kind in re.findall(r"tensor<((?:\d+x)+)(\w+)>", program)
        if np.prod([int(side) for side in sides.split("x")[:-1]]) >= 4096**2
    }
    assert large == {"f8E4M3FN"}
    # Nothing reads them but our kernels and the transpositions before those, which
    # change no order in memory if `contraction_minor` laid the codes out.
    readers = {
        operation
        for operation, operands in re.findall(
            r"= (?:stablehlo\.)?(\S+) .*: \(?(tensor<[^)\n]*)\)? ->", program
        )
        if re.search(r"<\d{4,}x\d{4,}xf8E4M3FN>", operands)
    }
    assert readers <= {"transpose", "custom_call", "call"}
    assert "transpose" in readers
