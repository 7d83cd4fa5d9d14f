"""Products whose result is read transposed, as JAX's rule makes a weight's gradient.

`x w` has the gradient `transpose(dot_general(dout, x))`. Made in the order in which it
is read, `dot_general(x, dout)`, it needs no transpose: an update of the weight that had
to transpose could not write in place, and copied the weight and its moments each step.
"""

import collections
from collections.abc import Iterable

from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax.transform.ir import (
    AnyJaxpr,
    aval_of,
    dimension_numbers,
    is_product,
    permutation,
)


def read_transposed(jaxpr: AnyJaxpr, products: Iterable[int]) -> set[int]:
    """The numbers of those `dot_general`s that every reader wants with sides exchanged.

    Args:
        jaxpr: without constants.
        products: numbers of equations; those of other primitives do not count.
    """
    readers = collections.defaultdict(list)
    for eqn in jaxpr.eqns:
        for x in eqn.invars:
            if isinstance(x, core.Var):
                readers[x].append(eqn)
    results = {x for x in jaxpr.outvars if isinstance(x, core.Var)}
    found = set()
    for index in products:
        eqn = jaxpr.eqns[index]
        if not is_product(eqn) or eqn.outvars[0] in results:
            continue
        order = _exchanged_sides(eqn)
        reads = readers[eqn.outvars[0]]
        if order and reads and all(permutation(read) == order for read in reads):
            found.add(index)
    return found


def _exchanged_sides(dot: JaxprEqn) -> tuple[int, ...]:
    """The order that puts the dimensions of rhs first; () if that changes nothing."""
    (lhs_dims, _), (lhs_batch, _) = dimension_numbers(dot)
    rank = aval_of(dot.outvars[0]).ndim
    free = aval_of(dot.invars[0]).ndim - len(lhs_dims) - len(lhs_batch)
    if lhs_batch or free in (0, rank):
        return ()
    return (*range(free, rank), *range(free))
