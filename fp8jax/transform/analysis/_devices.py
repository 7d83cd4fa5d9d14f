"""Over how many devices a program's values are spread, as far as it says."""

from collections.abc import Iterable
from typing import Any

import jax

from fp8jax import _compat, ops
from fp8jax.transform.ir import AnyJaxpr, Construct, jaxprs_of, shardings_of


def spread_of_program(jaxpr: AnyJaxpr) -> ops.Spread:
    """Whether the program, or the mesh around it, names shardings over devices."""
    told = (
        ops.spread_of_mesh(x) if is_mesh else ops.spread_of_sharding(x)
        for x, is_mesh in _named_in(jaxpr)
    )
    return max((ops.spread(), *told))


def axes_of_program(jaxpr: AnyJaxpr) -> dict[str, int]:
    """Sizes of the mesh axes that the program names, or the mesh around it has."""
    axes = dict(ops.axes_of_mesh(jax.sharding.get_abstract_mesh()))
    for x, is_mesh in _named_in(jaxpr):
        axes.update(ops.axes_of_mesh(x) if is_mesh else ops.axes_of_sharding(x))
    return axes


def _named_in(jaxpr: AnyJaxpr) -> Iterable[tuple[Any, bool]]:
    """Meshes of shard_maps, and shardings elsewhere; and whether one is a mesh.

    The bodies of shard_maps are not looked into: they run on one device each.
    """
    seen: set[int] = set()

    def visit(jaxpr: AnyJaxpr) -> Iterable[tuple[Any, bool]]:
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            construct = Construct.of(eqn)
            if construct is not None and construct.mesh is not None:
                yield construct.mesh, True
                continue
            yield from ((sharding, False) for sharding in shardings_of(eqn))
            for sub in jaxprs_of(eqn):
                yield from visit(sub)

    return visit(jaxpr)
