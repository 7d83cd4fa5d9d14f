"""In a program for a GPU fake quantization is no identity, as a cast and back is."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import fp8jax
from benchmarks import _h100

pytestmark = pytest.mark.compiled


def compiled(fn: Any, dtype: Any) -> str:
    where = SingleDeviceSharding(_h100.devices(1)[0])
    x = jax.ShapeDtypeStruct((256, 256), dtype, sharding=where)
    traced = jax.jit(fn).trace(x)
    return str(traced.lower(lowering_platforms=("cuda",)).compile().as_text())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_codes_are_not_dropped_as_excess_precision(dtype):
    program = compiled(
        lambda x: fp8jax.fake_quantize(x, implementation="xla") - x, dtype
    )
    assert "f8e4m3fn[256,256]" in program


def test_the_compiler_would_drop_a_cast_and_back():
    # Else the test above is about nothing.
    program = compiled(
        lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32) - x, jnp.float32
    )
    assert "f8e4m3fn" not in program
