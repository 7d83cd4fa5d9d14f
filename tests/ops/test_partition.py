"""Products that XLA splits over devices: mapped ones, and what a shard lowers."""

import functools
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _dispatch, ops
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
    # The same codes: float32 sums of 256 products of order one in another order move by
    # a few 2^-24 of magnitudes that add up to some 160.
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


def test_export_of_one_device_works_and_of_several_says_what_to_do():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x, w = normal(0, 1024, 256), normal(1, 256, 128)
    exported = jax.export.export(jax.jit(product))(x, w)
    # As above; so are the other two.
    np.testing.assert_allclose(exported.call(x, w), product(x, w), rtol=1e-5, atol=1e-5)
    rows = NamedSharding(mesh, P("a")), NamedSharding(mesh, P())
    sharded = jax.jit(product, in_shardings=rows)
    with pytest.raises(NotImplementedError, match=r"cannot be exported: .*shard_map"):
        jax.export.export(sharded)(x, w)
    local = jax.jit(
        jax.shard_map(product, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    )
    exported = jax.export.export(local)(*map(jax.device_put, (x, w), rows))
    found = exported.call(*map(jax.device_put, (x, w), rows))
    np.testing.assert_allclose(found, product(x, w), rtol=1e-5, atol=1e-5)


_CACHED = """
import sys
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fp8jax
from fp8jax import recipes

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (1024, 256))
w = jax.random.normal(jax.random.key(1), (256, 128))
x = jax.device_put(x, NamedSharding(mesh, P("a")))

def step(x, w):
    dims = (((1,), (0,)), ((), ()))
    recipe = getattr(recipes, sys.argv[2])(**eval(sys.argv[3]))
    return fp8jax.dot_general(x, w, dims, recipe=recipe, implementation="xla")

y = jax.jit(step)(x, w)
alone = jax.jit(step)(*map(jax.device_put, jax.device_get((x, w))))
# As above: 256 products' magnitudes add up to some 160, of which 8 * 2^-24.
assert abs(jax.device_get(y) - jax.device_get(alone)).max() < 1e-4
"""


def test_persistent_cache_hits_in_another_process_and_tells_recipes_apart(tmp_path):
    def entries(recipe, **how):
        command = [sys.executable, "-c", _CACHED, str(tmp_path), recipe, repr(how)]
        subprocess.run(command, check=True, timeout=300)
        return {f.name for f in tmp_path.glob("jit_step-*-cache")}

    first = entries("deepseek_v3")
    assert first
    assert entries("deepseek_v3") == first  # A hit writes nothing.
    # Two programs, one of eight devices and one of one.
    assert len(entries("deepseek_v3", scale="fp32") - first) == len(first)
