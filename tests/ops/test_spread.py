"""Who may split an array over devices, from what a trace can see."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import _compat, _dispatch, ops
from fp8jax.ops import Spread, spread


def mesh_of(*kinds):
    shape = (8,) if len(kinds) == 1 else (2, 4)
    return jax.make_mesh(shape, ("a", "b")[: len(kinds)], axis_types=kinds)


def test_arrays_tell_where_they_lie():
    x = jnp.ones((8, 8))
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("a"))
    assert spread() == spread(x, 3.0) == Spread.ONE
    assert spread(x, jax.device_put(x, sharding)) == Spread.MANY
    typed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    assert spread(typed) == Spread.MANY
    assert spread(jax.ShapeDtypeStruct(x.shape, x.dtype)) == Spread.ONE


def test_tracers_do_not_tell_but_a_mesh_in_context_does():
    seen = []

    def look(x):
        seen.append(spread(x))
        return x

    jax.jit(look)(jnp.ones(8))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        jax.jit(look)(jnp.ones(8))
    assert seen == [Spread.UNKNOWN, Spread.MANY]


def test_body_of_a_shard_map_is_one_device_s_if_it_maps_the_whole_mesh():
    seen = {}

    def look(name):
        def run(x):
            seen[name] = spread(x)
            return x

        return run

    for name, mesh, axes in (
        ("whole", mesh_of(AxisType.Auto), {"a"}),
        ("part", mesh_of(AxisType.Auto, AxisType.Auto), {"a"}),
    ):
        specs = {"mesh": mesh, "in_specs": P("a"), "out_specs": P("a")}
        jax.jit(jax.shard_map(look(name), axis_names=axes, **specs))(jnp.ones(8))
    assert seen == {"whole": Spread.ONE, "part": Spread.MANY}


def test_experts_in_fp8_warn_where_their_arrays_are_known_to_be_split(monkeypatch):
    monkeypatch.setattr(_dispatch, "check_available", lambda name: None)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    w = fp8jax.quantize(
        jnp.ones((2, 128, 128)), fp8jax.BLOCK_128X128, implementation="xla"
    )
    x, sizes = jnp.ones((8, 128)), jnp.array([3, 5])
    sharded = jax.device_put(x, NamedSharding(mesh, P("a")))
    with pytest.warns(UserWarning, match="expert_mlp runs in XLA's emulation of FP8"):
        ops.expert_mlp(sharded, w, w, w, sizes)
    # A trace does not tell: as where they lie on one device.
    if _compat.JAX_VERSION >= (0, 11):
        traced = jax.jit(ops.expert_mlp).trace(x, w, w, w, sizes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
