"""Two products and their SwiGLU in one launch, against the XLA lowering.

Codes of small integers and scales of powers of two make the products exact: what is
left to differ is the exponential, and with it a code at a tie.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fp8jax.kernels import mosaic_gpu, xla
from tests.kernels.trust import on_cpu

HOW = {
    "lhs_tile": (1, 128),
    "rhs_tile": (128, 128),
    "between": jnp.bfloat16,
    "dtype": jnp.float8_e4m3fn,
    "scale": "pow2",
    "eps": 0.0,
}
SHAPES = [(16, 256, 384), (3, 384, 300), (64, 128, 128), (1, 128, 1)]
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpret mode came with JAX 0.11"
)


def _interpreting():
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def _operands(m: int, n: int, k: int) -> list[jax.Array]:
    rng = np.random.default_rng(m + n + k)
    out = []
    for rows, scale_rows in ((m, m), (n, -(-n // 128)), (n, -(-n // 128))):
        codes = rng.integers(-4, 5, (rows, k)).astype(np.float32)
        scales = 2.0 ** rng.integers(-4, 0, (scale_rows, -(-k // 128)))
        out.append(jnp.asarray(codes.astype(jnp.float8_e4m3fn)))
        out.append(jnp.asarray(scales, jnp.float32))
    return out


def _expected(operands, **how):
    return on_cpu(functools.partial(xla.gemm_swiglu, **HOW | how), *operands)


def _check(found, expected) -> None:
    (data, scale), (codes, factors) = found, expected
    np.testing.assert_array_equal(scale, factors)
    data, codes = (np.asarray(x).astype(np.float32) for x in (data, codes))
    # An exponential that is off by some ulps moves a code only at a tie.
    assert np.mean(data != codes) <= 2e-3
    # A step of E4M3 is at most an eighth; below 2^-6 it is 2^-9.
    np.testing.assert_allclose(data, codes, rtol=2**-3, atol=2**-9)


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_interpreted_is_the_oracle(m, n, k):
    operands = _operands(m, n, k)
    with _interpreting():
        found = jax.jit(functools.partial(mosaic_gpu.gemm_swiglu, **HOW))(*operands)
    _check(found, _expected(operands))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [*SHAPES, (16, 14336, 4096), (64, 20480, 640), (40, 256, 7168)]
)
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_is_the_oracle(m, n, k, scale):
    operands = _operands(m, n, k)
    run = jax.jit(functools.partial(mosaic_gpu.gemm_swiglu, **HOW | {"scale": scale}))
    found = run(*operands)
    _check(found, _expected(operands, scale=scale))
    for _ in range(5):
        for one, other in zip(run(*operands), found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((65, 256, 384), {}),
        ((16, 200, 384), {}),
        ((16, 256, 384), {"between": jnp.float32}),
    ],
    ids=["more rows", "a part of a tile", "float32 between"],
)
def test_what_one_launch_does_not_do_takes_three(shape, change):
    operands = _operands(*shape)
    run = jax.jit(functools.partial(mosaic_gpu.gemm_swiglu, **HOW | change))
    assert run.lower(*operands).as_text().count("mosaic_gpu_v2") == 3
    _check(run(*operands), _expected(operands, **change))


def _check_nan(context) -> None:
    operands = _operands(16, 256, 256)
    run = jax.jit(functools.partial(mosaic_gpu.gemm_swiglu, **HOW))
    with context():
        clean = run(*operands)
        operands[1] = operands[1].at[5, 1].set(jnp.nan)
        row = run(*operands)
        operands = _operands(16, 256, 256)
        operands[5] = operands[5].at[1, 0].set(jnp.nan)
        tile = run(*operands)
    others = np.arange(16) != 5
    assert np.isnan(row[1][5]).all()
    np.testing.assert_array_equal(row[1][others], clean[1][others])
    np.testing.assert_array_equal(row[0][others], clean[0][others])
    assert np.isnan(tile[1][:, 1]).all()
    np.testing.assert_array_equal(tile[0][:, :128], clean[0][:, :128])
    np.testing.assert_array_equal(tile[1][:, 0], clean[1][:, 0])


@interpreted
def test_interpreted_nan_stays_in_its_row_or_tile():
    _check_nan(_interpreting)


@pytest.mark.gpu
def test_nan_stays_in_its_row_or_tile():
    _check_nan(contextlib.nullcontext)


@interpreted
def test_lowers_with_64_bit_types_enabled():
    operands = _operands(16, 256, 384)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(mosaic_gpu.gemm_swiglu, **HOW))
        lowered = run.trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
