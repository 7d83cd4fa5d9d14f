"""Products that XLA splits over devices: mapped ones, and what a shard lowers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, ops
from fp8jax.ops import _lowered_once
from fp8jax.ops._partition import Factorization
from fp8jax.ops._product import MATRICES

SPECS = fp8jax.TILE_1X128, fp8jax.BLOCK_128X128

on_hopper = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for JAX 0.11 or newer"
)


def product(x, w):
    return ops.quantized_dot(x, w, MATRICES, *SPECS, split=True)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def hopper(monkeypatch):
    """As where a Hopper GPU is."""
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)


def test_mapped_factors_have_a_name_of_their_own():
    factors = Factorization.of(2, 2, MATRICES)
    left = factors.mapped((True, False))
    assert str(left) == "v0 m0 k0, k0 n1 -> v0 m0 n1"
    assert str(left.mapped((True, True))) == "v1 v0 m0 k0, v1 k0 n1 -> v1 v0 m0 n1"


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_mapped_product_is_split_and_has_the_numbers_of_each_by_itself(in_axes):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x, w = normal(0, 4, 256, 256), normal(1, 4, 256, 128)
    x, w = (v if a == 0 else v[0] for v, a in zip((x, w), in_axes, strict=True))

    def part(v, i):
        return v[i] if v.ndim == 3 else v

    wanted = np.stack(
        [
            np.asarray(ops.quantized_dot(part(x, i), part(w, i), MATRICES, *SPECS))
            for i in range(4)
        ]
    )
    specs = (P("a", "b") if v.ndim == 3 else P("b" if v is x else None) for v in (x, w))
    placed = [
        jax.device_put(v, NamedSharding(mesh, spec))
        for v, spec in zip((x, w), specs, strict=True)
    ]
    mapped = jax.jit(jax.vmap(product, in_axes))
    text = mapped.lower(*placed).compile().as_text()
    np.testing.assert_allclose(mapped(*placed), wanted, rtol=1e-5, atol=1e-5)
    if in_axes == (0, None):  # Nothing needs to move.
        assert "all-gather" not in text


@on_hopper
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_mapping_leaves_no_kernel_that_xla_would_gather_operands_for(in_axes):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P())
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=where)
    x, w = (struct((4, 256, 256) if a == 0 else (256, 256)) for a in in_axes)
    twice = jax.vmap(jax.vmap(product, in_axes), (0, 0))
    two = [struct((2, *v.shape)) for v in (x, w)]
    for fn, args in ((jax.vmap(product, in_axes), (x, w)), (twice, two)):
        traced = jax.jit(fn).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "CustomSPMDPartitioning" in text
        assert "mosaic_gpu" not in text


@on_hopper
@pytest.mark.usefixtures("hopper")
def test_equal_shards_are_lowered_once():
    _lowered_once._exported.cache_clear()
    calls = []

    def counted(x, w):
        calls.append(x.shape)
        return ops.quantized_dot(x, w, MATRICES, *SPECS)

    run = _lowered_once.lowered_once(counted)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    for _ in range(3):  # Each a program of its own, as the partitioner asks for.
        program = jax.jit(lambda x, w: run(x, w))
        text = program.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall("custom_call @mosaic_gpu", text)) == 3
    assert calls == [(256, 256)]
