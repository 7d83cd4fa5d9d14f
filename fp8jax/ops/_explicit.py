"""Operations on arrays whose types hold their shardings: as the plain one would do."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax import _compat


def is_explicit(*trees: Any) -> bool:
    """Whether the type of an array in one of the trees holds its sharding."""
    return any(_compat.is_explicit(jax.typeof(x)) for x in jax.tree.leaves(trees))


def refuse_explicit(name: str, *trees: Any) -> None:
    """Raises NotImplementedError, on behalf of `name`, for explicit shardings."""
    if is_explicit(*trees):
        types = ", ".join(str(jax.typeof(x)) for x in jax.tree.leaves(trees))
        raise NotImplementedError(
            f"{name} takes arrays of automatic shardings, or one device's in a "
            f"jax.shard_map, got explicit ones: {types}. Call it in jax.shard_map, or "
            "by jax.sharding.auto_axes."
        )


def check_out_sharding(name: str, out_sharding: Any, *arrays: jax.Array) -> None:
    """Raises NotImplementedError, on behalf of `name`, where it has no meaning."""
    if out_sharding is not None and not is_explicit(arrays):
        raise NotImplementedError(
            f"{name} in FP8 takes out_sharding= of arrays on an explicit mesh, got "
            f"{out_sharding} elsewhere: constrain the result with "
            "jax.lax.with_sharding_constraint instead."
        )


def summed_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [..., k] w [k, n]`, of which no device keeps a part of a sum.

    On an explicit mesh JAX leaves that to the user where both are split along k; inside
    of a layer it goes without saying.
    """
    sharding = None
    if is_explicit(x, w):
        mesh, x_spec = (getattr(jax.typeof(x).sharding, s) for s in ("mesh", "spec"))
        spec = PartitionSpec(*x_spec[:-1], jax.typeof(w).sharding.spec[-1])
        sharding = NamedSharding(mesh, spec)
    numbers = ((x.ndim - 1,), (0,)), ((), ())
    return lax.dot_general(x, w, numbers, out_sharding=sharding)


def typed_as(plain: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`, whose results are sharded as those of `plain(*args)`.

    Within, shardings are automatic: XLA's partitioner splits what `run` is made of.

    Args:
        plain: an operation on the same arrays that JAX has rules for, of results of the
            same shapes. What it refuses is refused in its words.
        run: what is computed.
        args: pytrees of arrays.
    """
    if not is_explicit(*args):
        return run(*args)
    jaxpr, results = jax.make_jaxpr(plain, return_shape=True)(*args)
    # Not those of `results`, which leave out a mesh of several axis types.
    avals: Any = jaxpr.out_avals
    shardings = [x.sharding for x in avals]
    shardings = jax.tree.unflatten(jax.tree.structure(results), shardings)
    mesh = jax.sharding.get_abstract_mesh()
    axes = mesh.explicit_axes or None  # Without a context, those of the arrays' mesh.
    # NOTE: differentiated as one call, in whose mesh JAX then transposes its equations.
    inner = jax.jit(run)
    return jax.sharding.auto_axes(inner, axes=axes, out_sharding=shardings)(*args)
