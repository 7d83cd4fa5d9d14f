"""QTensor is a well-behaved pytree."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fp8jax


@pytest.fixture
def q():
    x = np.random.default_rng(0).standard_normal((256, 384), dtype=np.float32)
    return fp8jax.quantize(jnp.asarray(x), fp8jax.BLOCK_128X128)


def test_leaves_are_data_and_scale_and_the_tile_is_static(q):
    leaves, treedef = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [jnp.float8_e4m3fn, jnp.float32]
    assert jax.tree.unflatten(treedef, leaves).tile == (128, 128)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(q)]
    assert paths == [".data", ".scale"]


def test_survives_jit_vmap_scan_and_tree_map(q):
    chex.assert_trees_all_equal(jax.jit(lambda q: q)(q), q)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), q)
    assert stacked.shape == (2, 256, 384)
    chex.assert_trees_all_equal(
        jax.vmap(lambda q: q.dequantize())(stacked)[1], q.dequantize()
    )
    _, out = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    chex.assert_trees_all_equal(out[0], q.dequantize())
    assert jax.tree.map(lambda _: None, q) == fp8jax.QTensor(None, None, (128, 128))
    assert jax.eval_shape(lambda q: q.T, q).shape == (384, 256)


def test_is_sharded_leaf_by_leaf(q):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec("model", None))
    placed = jax.device_put(q, sharding)
    assert placed.data.sharding == sharding
    assert placed.scale.sharding == sharding
    values = jax.jit(lambda q: q.dequantize())(placed)
    chex.assert_trees_all_equal(np.asarray(values), np.asarray(q.dequantize()))


def test_repr_says_shape_tile_dtype_and_bytes(q):
    expected = (
        f"QTensor(shape=(256, 384), tile=(128, 128), dtype=float8_e4m3fn, "
        f"nbytes={256 * 384 + 6 * 4})"
    )
    assert repr(q) == expected
    assert (
        repr(jax.tree.map(lambda _: 0, q))
        == "QTensor(data=0, scale=0, tile=(128, 128))"
    )
    assert "float8_e4m3fn" in repr(jax.eval_shape(lambda: q))


def test_transposes_codes_scales_and_tile():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 256), "f"))
    q = fp8jax.quantize(x)
    assert q.T.shape == (3, 256, 4)
    assert q.T.tile == (128, 1)
    chex.assert_trees_all_equal(q.T.dequantize(), q.dequantize().mT)
    chex.assert_trees_all_equal(q.T.T, q)


def test_dequantizes_to_the_dtype_asked_for(q):
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    chex.assert_trees_all_equal(
        q.dequantize(jnp.bfloat16), q.dequantize().astype(jnp.bfloat16)
    )


def test_576_rows_have_5_rows_of_scales():
    q = fp8jax.quantize(jnp.ones((576, 7168)), fp8jax.BLOCK_128X128)
    assert q.scale.shape == (5, 56)
    chex.assert_trees_all_equal(q.dequantize(), jnp.ones((576, 7168)))


def test_is_copied_and_pickled(q):
    chex.assert_trees_all_equal(copy.deepcopy(q), q)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(q)), q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": jnp.ones((2, 2))}, r"scale\.shape=\(2, 2\); allowed: \(2, 3\)"),
        ({"scale": jnp.ones((2, 3), jnp.bfloat16)}, "float32 scale, got .*bfloat16"),
        ({"data": jnp.ones((256, 384))}, "FP8 data .*got float32"),
        ({"data": jnp.ones(256, jnp.float8_e4m3fn)}, r"data\.shape=\(256,\)"),
    ],
)
def test_a_broken_invariant_is_named(q, change, message):
    broken = fp8jax.QTensor(**{**vars(q), **change})
    with pytest.raises(ValueError, match=message):
        broken.dequantize()
