"""Who may split an array over devices, from what a trace can see."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
