"""Every Mosaic GPU kernel's results stand behind a barrier: XLA must not clone calls.

What that is worth shows in a compiled step: a product whose result a scan stacks runs
once. Here it is held for each kernel by itself, on any machine.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from fp8jax._elementwise import Elementwise, Step
from fp8jax.kernels import mosaic_gpu

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)

E4M3, F32, BF16 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16
ROW, BLOCK = (1, 128), (128, 128)
HOW = {"dtype": E4M3, "scale": "pow2", "eps": 0.0}


def _array(*shape, dtype=E4M3):
    return jax.ShapeDtypeStruct(shape, dtype)


_X = _array(256, 256, dtype=BF16)
_LHS = _array(256, 256), _array(256, 2, dtype=F32)
_FEW = _array(16, 256), _array(16, 2, dtype=F32)
_WEIGHT = _array(256, 256), _array(2, 2, dtype=F32)
_EXPERTS = _array(4, 256, 256), _array(4, 2, 2, dtype=F32)
_SIZES = _array(4, dtype=jnp.int32)
_GEMM = {"lhs_tile": ROW, "rhs_tile": BLOCK, "out_dtype": BF16}

_DOUBLED = (Step("add", (0, 0), jnp.dtype(BF16)),)
_TWICE = Elementwise(("matrix",), (jnp.dtype(BF16),), _DOUBLED, (1,))

# Name, static arguments, arrays; of every kernel that there is.
CALLS = {
    "quantize_map": (
        "quantize_map",
        {**HOW, "function": _TWICE, "tiles": ((ROW, BLOCK),)},
        (_X,),
    ),
    "fprop": ("gemm", _GEMM, (*_LHS, *_WEIGHT)),
    "wgrad": ("gemm", {**_GEMM, "rhs_tile": ROW}, (*_LHS, *_LHS)),
    "blocked wgrad": (
        "gemm",
        {**_GEMM, "lhs_tile": BLOCK, "rhs_tile": ROW},
        (*_WEIGHT, *_LHS),
    ),
    "fprop to float16": (
        "gemm",
        {**_GEMM, "out_dtype": jnp.float16},
        (*_LHS, *_WEIGHT),
    ),
    "experts": ("grouped_gemm", _GEMM, (*_LHS, *_EXPERTS, _SIZES)),
    "experts' wgrad": (
        "grouped_gemm_k",
        {**_GEMM, "rhs_tile": ROW},
        (*_LHS, *_LHS, _SIZES),
    ),
    "few rows of a gated MLP": (
        "gemm_swiglu",
        {"lhs_tile": ROW, "rhs_tile": BLOCK, "between": BF16, **HOW},
        (*_FEW, *_WEIGHT, *_WEIGHT),
    ),
    "quantize": ("quantize", {"tile": ROW, **HOW}, (_X,)),
    "quantize_both": ("quantize_both", {"tile": ROW, "tile_t": ROW, **HOW}, (_X,)),
    "quantize_swiglu": (
        "quantize_swiglu",
        {"tile": ROW, "tile_t": ROW, **HOW},
        (_X, _X),
    ),
    "quantize_rms_norm": (
        "quantize_rms_norm",
        {"epsilon": 1e-6, "tile": ROW, **HOW},
        (_X, _array(256, dtype=BF16)),
    ),
    "quantize_add_rms_norm": (
        "quantize_add_rms_norm",
        {"epsilon": 1e-6, "tile": ROW, **HOW},
        (_X, _X, _array(256, dtype=BF16)),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_results_are_read_behind_a_barrier_alone(call):
    name, static, arrays = CALLS[call]
    run = jax.jit(functools.partial(getattr(mosaic_gpu, name), **static))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert f"fp8jax_{name.replace('add_', '')}_" in text  # As profilers show it.
    calls = 0
    for function in text.split("\n  func.func")[1:]:  # Each has names of its own.
        lines = function.split("\n")
        kernels = [line for line in lines if "custom_call @mosaic_gpu" in line]
        others = [line for line in lines if line not in kernels]
        for kernel in kernels:
            result = re.match(r" *(%\d+)", kernel)
            assert result is not None
            read = re.compile(rf"{result[1]}(?!\d)")
            readers = [line for line in others if read.search(line)]
            assert readers
            assert all("stablehlo.optimization_barrier" in line for line in readers)
        calls += len(kernels)
    assert calls
