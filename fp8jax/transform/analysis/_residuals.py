"""How many bytes a program's forward pass keeps for its backward pass."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import Var

from fp8jax import _compat
from fp8jax.transform.analysis._phases import OUTSIDE, Pass, Passes
from fp8jax.transform.analysis._weight_flags import add_results, flagged, inner_flags
from fp8jax.transform.ir import AnyJaxpr, aval_of, construct_of, primitive_of

# Another name for the same bytes.
_VIEWS = ("name", "reshape", "squeeze", "transpose")


def residual_bytes(jaxpr: AnyJaxpr, is_weight: Sequence[bool]) -> int:
    """Bytes of arrays that forward equations make and backward ones read.

    What depends on parameters alone does not count: neither copies of weights in
    another dtype nor their codes. In loops that hold both passes it is one iteration's.
    XLA may keep less: it may compute a cheap value again.

    Args:
        jaxpr: of a whole step.
        is_weight: for each input, whether it is a parameter.
    """
    return _bytes(jaxpr, tuple(is_weight), OUTSIDE, Passes())


def _bytes(
    jaxpr: AnyJaxpr, is_weight: tuple[bool, ...], outer: Pass, passes: Passes
) -> int:
    inner = _compat.open_jaxpr(jaxpr)
    weights = flagged(jaxpr, is_weight)
    made: set[Var] = set()  # By forward equations.
    base: dict[Any, Any] = {}
    kept: set[Var] = set()
    within = 0
    for eqn in inner.eqns:
        here = passes.at(outer, eqn)
        operands = [x for x in eqn.invars if isinstance(x, core.Var)]
        sources = [base.get(x, x) for x in operands]
        add_results(eqn, weights)
        if here.phase == "forward":
            if primitive_of(eqn) in _VIEWS:
                base[eqn.outvars[0]] = sources[0] if sources else eqn.outvars[0]
            else:
                made.update(eqn.outvars)
        elif here.phase != "outside":
            kept.update(x for x in sources if x in made and x not in weights)
        construct = construct_of(eqn, with_rules=True)
        if construct is not None:
            inside = zip(construct.bodies, inner_flags(construct, weights), strict=True)
            for body, flags in inside:
                within = max(within, _bytes(body, flags, here, passes))
    return sum(math.prod(aval_of(v).shape) * _itemsize(v) for v in kept) + within


def _itemsize(v: Var) -> int:
    return getattr(aval_of(v).dtype, "itemsize", 0)
