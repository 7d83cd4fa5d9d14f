"""Experts' weights as QTensors: the codes' own products, a byte a weight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
import fp8jax.linen
import fp8jax.nnx
from fp8jax import _compat, _dispatch, numerics, ops, quant, recipes
from fp8jax.testing import assert_same_bits

M, G, K, HIDDEN = 96, 4, 200, 264
TOP_K, SHARED = 2, 2
SPEC = recipes.deepseek_v3().fprop.rhs.T  # As `expert_mlp` quantizes them itself.
SIZES = jnp.array([40, 0, 1, 50])

pytestmark = pytest.mark.usefixtures("one_device")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def weights(dtype=jnp.float32, groups=G):
    shapes = (groups, K, HIDDEN), (groups, K, HIDDEN), (groups, HIDDEN, K)
    arrays = (normal(i, *s) * s[1] ** -0.5 for i, s in enumerate(shapes))
    return [a.astype(dtype) for a in arrays]


def codes(arrays, spec=SPEC):
    return [fp8jax.quantize(w, spec) for w in arrays]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("recipe", [None, recipes.deepseek_v3(residual="fp8")])
def test_same_codes_have_the_same_bits_as_weights_quantized_online(dtype, recipe):
    x, arrays = normal(9, M, K, dtype=dtype), weights(dtype)
    run = jax.jit(functools.partial(ops.expert_mlp, recipe=recipe))
    y = run(x, *codes(arrays), SIZES)
    assert_same_bits(y, run(x, *arrays, SIZES))
    assert not np.any(y[91:])
    laid = [quant.contraction_minor(q) for q in codes(arrays)]
    assert_same_bits(run(x, *laid, SIZES), y)


def input_gradient(x, kernels, dout, **how):
    run = functools.partial(ops.expert_mlp, group_sizes=SIZES, **how)
    _, vjp = jax.vjp(lambda x: run(x, *kernels), x)
    return vjp(dout)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_input_s_gradient_has_the_bits_of_weights_quantized_online(dtype):
    x, arrays, dout = normal(9, M, K, dtype=dtype), weights(dtype), normal(8, M, K)
    run = jax.jit(functools.partial(input_gradient, dout=dout.astype(dtype)))
    dx = run(x, codes(arrays))
    assert_same_bits(dx, run(x, arrays))
    assert not np.any(dx[91:])


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [
        (fp8jax.QuantSpec((128, 64)), recipes.deepseek_v3()),
        (SPEC, recipes.Recipe(recipes.deepseek_v3().fprop, None, None)),
    ],
)
def test_input_s_gradient_without_codes_for_it_is_by_the_values(spec, recipe):
    x, kernels, dout = normal(9, M, K), codes(weights(), spec), normal(8, M, K)
    dx = input_gradient(x, kernels, dout, recipe=recipe)
    values = [q.dequantize() for q in kernels]
    exact = input_gradient(x, values, dout, recipe=recipes.bf16())
    # gate and up come of codes, 2^-4 off at most, and go through the activation.
    assert numerics.sqnr_db(dx, exact) > 20


def test_other_scales_are_near_the_values():
    x, arrays = normal(9, M, K), weights()
    spec = fp8jax.QuantSpec((128, 128), scale="fp32")
    y = ops.expert_mlp(x, *codes(arrays, spec), SIZES)
    exact = ops.expert_mlp(x, *arrays, SIZES, recipe=recipes.bf16())
    # As any chain of two products: operands off by up to 2^-4 of themselves.
    assert numerics.sqnr_db(y, exact) > 15


def router():
    return normal(5, K, G) / 14, 0.1 * normal(6, G)


def test_mixture_has_the_bits_of_weights_quantized_online():
    x, arrays = normal(9, 2, M // 2, K), weights()
    run = jax.jit(functools.partial(ops.moe, top_k=TOP_K))
    assert_same_bits(run(x, *router(), *codes(arrays)), run(x, *router(), *arrays))


def state(spec=SPEC):
    """A layer's experts and shared experts, as codes."""
    names = "gate", "up", "down"
    sides = (K, SHARED * HIDDEN), (K, SHARED * HIDDEN), (SHARED * HIDDEN, K)
    shared = [normal(20 + i, *s) * s[0] ** -0.5 for i, s in enumerate(sides)]

    def kernels(arrays):
        found = zip(names, codes(arrays, spec), strict=True)
        return {name: {"kernel": q} for name, q in found}

    return {"experts": kernels(weights()), "shared": kernels(shared)}


def by_nnx(params, x, **options):
    layer = fp8jax.nnx.MoE(
        K, HIDDEN, G, top_k=TOP_K, num_shared=SHARED, rngs=nnx.Rngs(0), **options
    )
    nnx.update(layer, params)
    layer.router.kernel[...], layer.router.bias[...] = router()
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    return y, layer.router.load[...]


def by_linen(params, x, **options):
    layer = fp8jax.linen.MoE(HIDDEN, G, TOP_K, num_shared=SHARED, **options)
    kernel, bias = router()
    variables = {
        "params": {**params, "router": {"kernel": kernel}},
        "router": {"router": {"bias": bias, "load": jnp.zeros(G, jnp.int32)}},
    }
    run = jax.jit(functools.partial(layer.apply, mutable=["router"]))
    y, updated = run(variables, x)
    return y, updated["router"]["router"]["load"]


both = pytest.mark.parametrize("apply", [by_nnx, by_linen])


@both
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layers_are_the_function_and_the_shared_experts(apply, dtype):
    x, params = normal(9, 2, M // 2, K), state()
    y, load = apply(params, x, dtype=dtype)

    @jax.jit
    def expected(params, x):
        x = x if dtype is None else x.astype(dtype)
        experts, shared = (
            [params[part][name]["kernel"] for name in ("gate", "up", "down")]
            for part in ("experts", "shared")
        )
        y, load = ops.moe(x, *router(), *experts, top_k=TOP_K)
        name, out = "shared", x.dtype
        return y + ops.static_weight_swiglu(name, x, *shared, out_dtype=out), load

    value, count = expected(params, x)
    assert y.dtype == value.dtype
    # XLA may add in another order, and a code at a tie then moves.
    assert numerics.sqnr_db(y, value) > 45
    np.testing.assert_array_equal(load, count)
    assert load.sum() == M * TOP_K


@both
def test_what_is_below_frozen_experts_is_trained(apply):
    """Adapters say: the router's and the shared experts' input has a gradient, too."""
    x, params = normal(9, 2, M // 2, K), state()
    dx = jax.grad(lambda x: jnp.sum(apply(params, x)[0] ** 2))(x)
    assert dx.shape == x.shape
    assert np.isfinite(dx).all()
    assert np.any(dx != 0, axis=-1).all()


@both
def test_refusals_name_what_came(apply):
    x, params = normal(9, M, K), state()
    mixed = {**params["experts"], "up": {"kernel": weights()[1]}}
    with pytest.raises(ValueError, match=r"QTensor \[4, 200, 264\], array \[4, 200, "):
        apply({**params, "experts": mixed}, x)
    with pytest.raises(
        ValueError, match=r"expert_mlp with a QTensor .*fprop is in FP8"
    ):
        apply(params, x, recipe=recipes.bf16())
    with pytest.raises(ValueError, match=r"takes tiles of 128 along.*tile=\(128, 64\)"):
        apply(state(fp8jax.QuantSpec((64, 128))), x)
    with pytest.raises(TypeError, match=r"expert_mlp with a QTensor has no gradient"):
        jax.grad(lambda p: apply(p, x)[0].sum())(params)


def test_shapes_that_do_not_fit_are_named():
    x, (gate, up, down) = normal(9, M, K), codes(weights())
    other = codes(weights(groups=G - 1))
    for bad in (
        (x[0], gate, up, down, SIZES),
        (x[:, 1:], gate, up, down, SIZES),
        (x, gate, up, other[2], SIZES),
        (x, gate, up, up, SIZES),
        (x, gate, up, down, SIZES[1:]),
        (x, gate, up, down, SIZES.astype(jnp.float32)),
    ):
        with pytest.raises(ValueError, match=r"expert_mlp takes x \[rows, k\], once"):
            ops.expert_mlp(*bad)
    with pytest.raises(ValueError, match=r"moe takes x \[.*router"):
        ops.moe(x, *router(), *other, top_k=TOP_K)


WIDE = 1024


def decode_step(tokens):
    """A layer of a wide mixture as shapes alone: a function and its arguments."""
    shapes = (G, WIDE, WIDE), (G, WIDE, WIDE), (G, WIDE, WIDE)
    kernels = [
        jax.eval_shape(
            lambda w: fp8jax.quantize(w, SPEC, implementation="xla"),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        )
        for shape in shapes
    ]
    x = jax.ShapeDtypeStruct((tokens, WIDE), jnp.bfloat16)
    route = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((WIDE, G), (G,)))
    run = jax.jit(functools.partial(ops.moe, top_k=TOP_K))
    return run, (x, *route, *kernels)


def test_program_is_given_a_byte_a_weight():
    run, arguments = decode_step(8)
    with jax.numpy_dtype_promotion("standard"):
        memory = run.lower(*arguments).compile().memory_analysis()
    count = 3 * G * WIDE**2
    # Scales are 4 bytes in 16384, and the rest are x and the router.
    assert 0 <= memory.argument_size_in_bytes - count * (1 + 4 / 16384) < 2**16


@pytest.mark.skipif(_compat.JAX_VERSION < (0, 11), reason="GPU kernels need JAX 0.11")
@pytest.mark.parametrize("tokens", [8, 512])
def test_no_weight_is_inflated_on_a_gpu(tokens, monkeypatch):
    run, arguments = decode_step(tokens)
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    with jax.numpy_dtype_promotion("standard"):
        traced = run.trace(*arguments)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    large = {
        kind
        for sides, kind in re.findall(r"tensor<((?:\d+x)+)(\w+)>", program)
        if np.prod([int(side) for side in sides.split("x")[:-1]]) > 2 * WIDE**2
    }
    assert large == {"f8E4M3FN"}
