"""GPU kernels in programs of their own, lowered once for all of them."""

import re

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import _dispatch, _lowered_once, ops
from fp8jax.ops._product import MATRICES

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """As where a Hopper GPU is."""
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    _lowered_once._exported.cache_clear()


def product(x, w):
    specs = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128
    return ops.quantized_dot(x, w, MATRICES, *specs)


def once(fn):
    def run(*args):
        with _lowered_once.kernels_lowered_once():
            return fn(*args)

    return run


def kernels(fn, *shapes):
    """GPU kernels in the program of a function of arrays of these shapes."""
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    traced = jax.jit(lambda *args: fn(*args)).trace(*args)  # Not traced before.
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall("custom_call @mosaic_gpu", text))


def lowered():
    return _lowered_once._exported.cache_info().misses


def test_equal_kernels_of_several_programs_are_lowered_once():
    square = (256, 256), (256, 256)
    for _ in range(3):
        assert kernels(once(product), *square) == 3
    assert lowered() == 3
    # Another product with the same weight's kernel: x's and the GEMM are new.
    assert kernels(once(product), (512, 256), (256, 256)) == 3
    assert lowered() == 5


def test_nothing_is_kept_where_it_is_not_asked_for():
    assert kernels(product, (256, 256), (256, 256)) == 3
    assert lowered() == 0


@pytest.mark.parametrize("in_axes", [(0, None), (0, 0)])
def test_mapped_kernels_are_mapped_by_their_own_rules(in_axes):
    shapes = [(4, 256, 256) if a == 0 else (256, 256) for a in in_axes]
    mapped = jax.vmap(product, in_axes)
    assert kernels(once(mapped), *shapes) == kernels(mapped, *shapes)
