"""Over how many devices a program's values are spread, as far as it says."""

from collections.abc import Iterable

from fp8jax import _compat, ops
from fp8jax.transform.ir import AnyJaxpr, Construct, jaxprs_of, shardings_of


def spread_of_program(jaxpr: AnyJaxpr) -> ops.Spread:
    """Whether the program, or the mesh around it, names shardings over devices.

    The bodies of shard_maps are not looked into: they run on one device each.
    """
    seen: set[int] = set()

    def visit(jaxpr: AnyJaxpr) -> Iterable[ops.Spread]:
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for eqn in _compat.open_jaxpr(jaxpr).eqns:
            construct = Construct.of(eqn)
            if construct is not None and construct.mesh is not None:
                yield ops.spread_of_mesh(construct.mesh)
                continue
            yield from map(ops.spread_of_sharding, shardings_of(eqn))
            for sub in jaxprs_of(eqn):
                yield from visit(sub)

    return max((ops.spread(), *visit(jaxpr)))
