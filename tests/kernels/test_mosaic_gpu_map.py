"""Elementwise functions, fused with quantization: the oracle's numbers.

The oracle evaluates the function step by step, unjitted, so that each result is rounded
to its dtype, and quantizes what comes out. A sum or a product has one right result, and
the bits are the same, on a GPU too, with two exceptions there: logistic is off by some
ulps of float32, so that one in 2^12 bfloat16 results rounds to a neighbour; and a
product that is added may be added unrounded (a fused multiply-add), which moves the sum
by half an ulp of the product.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax._elementwise import FUNCTIONS, Elementwise, Step
from fp8jax.kernels import mosaic_gpu, xla
from fp8jax.kernels.mosaic_gpu import _map
from fp8jax.testing import assert_codes_differ_by_last_bits, assert_same_bits
from tests.kernels.trust import assert_repeats

ROW, BOX = (1, 128), (128, 128)
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ONE = BF16.type(1)

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)


@contextlib.contextmanager
def _interpreting():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


# x * r * g of a norm, in float32.
NORM = Elementwise(
    ("matrix", "rows", "columns"),
    (BF16, F32, BF16),
    (
        Step("convert_element_type", (0,), F32),
        Step("mul", (3, 1), F32),
        Step("convert_element_type", (2,), F32),
        Step("mul", (4, 5), F32),
        Step("convert_element_type", (6,), BF16),
    ),
    (7,),
)
# The same of float32, which has no block of the result's dtype to be written over.
WIDE_NORM = Elementwise(
    ("matrix", "rows", "columns"),
    (F32, F32, F32),
    (
        Step("mul", (0, 1), F32),
        Step("mul", (3, 2), F32),
        Step("convert_element_type", (4,), BF16),
    ),
    (5,),
)
# What JAX's gradient of silu(gate) * up needs, in bfloat16: h, dgate, dup.
SWIGLU = Elementwise(
    ("matrix", "matrix", "matrix"),
    (BF16, BF16, BF16),
    (
        Step("logistic", (0,), BF16),  # 3
        Step("mul", (0, 3), BF16),  # 4: silu
        Step("mul", (4, 1), BF16),  # 5: h
        Step("mul", (4, 2), BF16),  # 6: dup
        Step("mul", (2, 1), BF16),  # 7: dsilu
        Step("sub", (ONE, 3), BF16),
        Step("mul", (3, 8), BF16),
        Step("mul", (7, 3), BF16),
        Step("mul", (0, 7), BF16),
        Step("mul", (11, 9), BF16),
        Step("add_any", (10, 12), BF16),
    ),
    (5, 13, 6),
)
# Rounded sums and products alone: bits are those of any right machine.
EXACT = Elementwise(
    ("matrix", "matrix", "columns"),
    (BF16, BF16, BF16),
    (
        Step("add", (0, 1), BF16),
        Step("mul", (3, 2), BF16),
        Step("max", (4, BF16.type(0)), BF16),
        Step("integer_pow", (5,), BF16, power=2),
        Step("gt", (0, 1), jnp.dtype(bool)),
        Step("neg", (6,), BF16),
        Step("select_n", (7, 6, 8), BF16),
    ),
    (9, 4),
)
CASES = {
    "norm": (NORM, ((ROW, None),)),
    "norm, blocks": (NORM, ((None, BOX),)),
    "wide norm": (WIDE_NORM, ((ROW, ROW),)),
    "swiglu": (SWIGLU, ((None, ROW), (ROW, ROW), (ROW, ROW))),
    "swiglu, blocks": (SWIGLU, ((None, BOX), (ROW, ROW), (ROW, ROW))),
    "exact": (EXACT, ((ROW, BOX), (BOX, BOX))),
}


def _inputs(function, m, k):
    rng = np.random.default_rng(m + k)
    shapes = {"matrix": (m, k), "rows": (m, 1), "columns": (1, k)}
    arrays = (rng.standard_normal(shapes[kind]) * 3 for kind in function.kinds)
    return [
        jnp.asarray(x, dtype) for x, dtype in zip(arrays, function.dtypes, strict=True)
    ]


@functools.cache  # One function, compiled once for all that has its shape.
def _quantize(kernels, function, tiles, scale="pow2"):
    return functools.partial(
        kernels.quantize_map,
        function=function,
        tiles=tiles,
        dtype=jnp.float8_e4m3fn,
        scale=scale,
        eps=0.0,
    )


def _oracle(function, tiles, inputs):
    """Step by step, each step compiled by itself, and then quantized."""

    def logistic(x):  # XLA's own of bfloat16 is rounded thrice within.
        return jnp.asarray(1 / (1 + np.exp(-np.float64(x))), jnp.float32)

    how = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}
    with jax.default_device(jax.devices("cpu")[0]):  # Which compiles each step sooner.
        inputs = map(np.asarray, inputs)
        values = function(*inputs, functions={**FUNCTIONS, "logistic": logistic})
        codes = tuple(
            tuple(
                tile and xla.quantize(value, tile=tile, transposed=transposed, **how)
                for tile, transposed in zip(both, (False, True), strict=True)
            )
            for value, both in zip(values, tiles, strict=True)
        )
        return jax.tree.map(np.asarray, codes)


def _got(function, tiles, inputs, context=contextlib.nullcontext):
    with context():
        got = jax.jit(_quantize(mosaic_gpu, function, tiles))(*inputs)
        return jax.tree.map(np.asarray, got)


def _check(case, shape, context=contextlib.nullcontext):
    function, tiles = CASES[case]
    inputs = _inputs(function, *shape)
    got = _got(function, tiles, inputs, context)
    expected = _oracle(function, tiles, inputs)
    if function is SWIGLU:
        # Not dgate, whose sum of two products may be fused.
        assert_codes_differ_by_last_bits((got[0], got[2]), (expected[0], expected[2]))
        _check_dgate(got[1], inputs)
    else:
        assert_same_bits(got, expected)


def _check_dgate(got, inputs):
    """Within the roundings of its steps and that of its codes."""
    gate, up, dh = (np.asarray(x).astype(np.float64) for x in inputs)
    sigmoid = 1 / (1 + np.exp(-gate))
    one, other = dh * up * sigmoid, gate * dh * up * (sigmoid * (1 - sigmoid))
    # A bfloat16 is rounded by up to 2^-8 of it: sigmoid, dh * up and one; of
    # 1 - sigmoid as much of 1, not of itself; and the sum. E4M3 is by 2^-4 of it, or by
    # 2^-10 of the scale.
    bound = 2.0**-8 * (
        3 * np.abs(one) + 6 * np.abs(other) + np.abs(gate * dh * up * sigmoid)
    ) + 2.0**-8 * np.abs(one + other)
    for (codes, scale), transposed in zip(got, (False, True), strict=True):
        factors = np.repeat(scale, 128, axis=1).astype(np.float64)
        value = codes.astype(np.float64) * factors
        exact, room = (x.T if transposed else x for x in (one + other, bound))
        of_codes = np.maximum(2.0**-4 * (np.abs(exact) + room), 2.0**-10 * factors)
        assert (np.abs(value - exact) <= room + of_codes).all()


@interpreted
@pytest.mark.parametrize("case", ["norm", "wide norm", "swiglu, blocks", "exact"])
def test_interpreted_is_the_oracle(case):
    _check(case, (128, 256), _interpreting)


@interpreted
def test_interpreted_a_nan_stays_in_its_tile():
    function, tiles = CASES["norm"]
    inputs = _inputs(function, 256, 256)
    inputs[1] = inputs[1].at[3].set(jnp.nan)
    (((_, scale), _),) = _got(function, tiles, inputs, _interpreting)
    assert np.isnan(scale[3]).all()
    assert np.isfinite(np.delete(scale, 3, axis=0)).all()


@interpreted
def test_interpreted_under_vmap_columns_may_differ():
    function, tiles = CASES["norm"]
    several = [_inputs(function, 128, 128 * (1 + i)) for i in range(2)]
    several = [[x[..., :128] for x in inputs] for inputs in several]
    stacked = [jnp.stack(xs) for xs in zip(*several, strict=True)]
    with _interpreting():
        mapped = jax.vmap(_quantize(mosaic_gpu, function, tiles))(*stacked)
        mapped = jax.tree.map(np.asarray, mapped)
    for i, inputs in enumerate(several):
        expected = jax.tree.map(np.asarray, _oracle(function, tiles, inputs))
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], mapped), expected)


def test_tanh_is_right_where_it_is_small_and_where_it_is_nearly_one():
    """GELU multiplies by 1 + tanh: of its tail nothing must be left but rounding."""
    x = np.concatenate([np.geomspace(1e-30, 30, 4001), [0.0]]).astype(np.float32)
    x = np.concatenate([x, -x])
    got = np.asarray(jax.jit(_map.tanh)(x)).astype(np.float64)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(got - exact) <= 2.0**-17 * np.abs(exact)).all()
    near_one = np.abs(x) > 1
    assert (np.abs(got - exact)[near_one] <= 2.0**-20).all()
    assert np.isnan(_map.tanh(jnp.float32(jnp.nan)))


def test_refuses_what_it_cannot_do():
    function, tiles = CASES["exact"]
    quantize = _quantize(mosaic_gpu, function, tiles)
    with pytest.raises(NotImplementedError, match=r"whole 128x128 .* got \[128, 130\]"):
        quantize(*_inputs(function, 128, 130))
    with pytest.raises(NotImplementedError, match=r"got tiles\[0\]\[0\]=\(128, 1\)"):
        _quantize(mosaic_gpu, function, (((128, 1), None),) * 2)(
            *_inputs(function, 128, 128)
        )
    wide = Elementwise(("matrix",) * 3, (F32,) * 3, (Step("add", (0, 1), F32),), (3,))
    with pytest.raises(NotImplementedError, match=r"at most 8 bytes .* got 12 bytes"):
        _quantize(mosaic_gpu, wide, ((ROW, None),))(*_inputs(wide, 128, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(128, 128), (1024, 2048), (16384, 384)])
def test_is_the_oracle(case, shape):
    _check(case, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["norm, blocks", "swiglu, blocks", "exact"])
def test_twenty_runs_give_the_same_bits(case):
    function, tiles = CASES[case]
    inputs = _inputs(function, 4096, 3072)
    run = jax.jit(_quantize(mosaic_gpu, function, tiles))
    assert_repeats(run, *inputs)


# In float64, of positive numbers; comparisons choose one of the two.
IN_NUMPY = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "div": np.divide,
    "eq": lambda x, y: np.where(x == y, x, y),
    "exp": np.exp,
    "exp2": np.exp2,
    "ge": lambda x, y: np.where(x >= y, x, y),
    "gt": lambda x, y: np.where(x > y, x, y),
    "le": lambda x, y: np.where(x <= y, x, y),
    "log": np.log,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": lambda x, y: np.where(x < y, x, y),
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": lambda x, y: np.where(x != y, x, y),
    "neg": np.negative,
    "rsqrt": lambda x: x**-0.5,
    "select_n": lambda x, y: np.where(x > 1, y, x),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}
ONE_OPERAND = {"abs", "convert_element_type", "copy", "exp", "exp2", "log", "logistic"}
ONE_OPERAND |= {"neg", "rsqrt", "sqrt", "square", "tanh"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_each_operation_is_taken_and_right(name):
    """In float32, within 2^-18 of the exact value, and the rounding of its code."""
    steps = [Step("convert_element_type", (i,), F32) for i in (0, 1)]
    if name == "select_n":
        steps.append(Step("gt", (2, F32.type(1)), jnp.dtype(bool)))
        steps.append(Step(name, (4, 2, 3), F32))
    else:
        operands = (2,) if name in ONE_OPERAND else (2, 3)
        chooses = name in ("eq", "ge", "gt", "le", "lt", "ne")
        steps.append(Step(name, operands, jnp.dtype(bool) if chooses else F32))
        if chooses:
            steps.append(Step("select_n", (4, 3, 2), F32))
    steps.append(Step("convert_element_type", (len(steps) + 1,), BF16))
    last = len(steps) + 1
    function = Elementwise(("matrix",) * 2, (BF16,) * 2, tuple(steps), (last,))
    inputs = [jnp.abs(x) + BF16.type(0.5) for x in _inputs(function, 256, 256)]
    codes, scale = _got(function, ((ROW, None),), inputs)[0][0]
    exact = [np.asarray(x).astype(np.float64) for x in inputs]
    value = IN_NUMPY[name](*exact[: 1 if name in ONE_OPERAND else 2])
    factors = np.repeat(scale, 128, axis=1).astype(np.float64)
    error = np.abs(codes.astype(np.float64) * factors - value)
    # The roundings to bfloat16 and to E4M3; near 1, log is near 0: 2^-18 of 1 there.
    room = 2.0**-8 * np.abs(value) + 2.0**-18 * np.maximum(np.abs(value), 1)
    of_codes = np.maximum(2.0**-4 * (np.abs(value) + room), 2.0**-10 * factors)
    assert (error <= room + of_codes).all()
