"""Equations in an order in which each comes after those that make what it reads."""

import itertools
from collections.abc import Sequence

from jax.extend.core import JaxprEqn, Var


def in_order(eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """The same equations, moved up only as far as others need their results.

    Those with side effects keep their order.

    Args:
        eqns: such that an order exists.
    """
    maker = {v: eqn for eqn in eqns for v in eqn.outvars}
    effects = [eqn for eqn in eqns if eqn.effects]
    before = {id(b): a for a, b in itertools.pairwise(effects)}
    out: list[JaxprEqn] = []
    done: set[int] = set()
    # A stack of its own: chains of equations are longer than Python's is deep.
    for last in eqns:
        stack = [last]
        while stack:
            eqn = stack[-1]
            if id(eqn) in done:
                stack.pop()
                continue
            operands = (x for x in eqn.invars if isinstance(x, Var))
            needed = [maker[x] for x in operands if x in maker]
            if id(eqn) in before:
                needed.append(before[id(eqn)])
            missing = [x for x in needed if id(x) not in done]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            done.add(id(eqn))
            out.append(eqn)
    return out
