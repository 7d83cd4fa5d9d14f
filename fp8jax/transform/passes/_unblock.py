"""Lets kernels in backward scans read slices of stacks where these lie.

A forward scan stacks what the backward scan reads, a slice per layer. `jax.checkpoint`
puts a barrier before what it recomputes, so that XLA does not merge it with the forward
pass; behind a barrier a slice is an array of its own, and copied. In a scan the barrier
is of no use, as JAX's documentation says: the forward pass is in another loop.
"""

from jax.extend.core import JaxprEqn

from fp8jax import ops
from fp8jax.transform.analysis import OUTSIDE, Pass, Passes
from fp8jax.transform.ir import (
    PRODUCT,
    RAGGED,
    AnyJaxpr,
    construct_of,
    equations,
    is_differentiated,
    jaxprs_of,
    memoized,
    primitive_of,
    with_equations,
    without_barrier,
)
from fp8jax.transform.lower import Program


def unblock(program: Program) -> Program:
    """Removes barriers of remat with our calls in backward scans."""
    passes = Passes()

    def visit(jaxpr: AnyJaxpr, outer: Pass, in_backward_scan: bool) -> AnyJaxpr:
        eqns = equations(jaxpr)
        # What a barrier is for would stand beside it.
        frees = in_backward_scan and not any(map(_multiplies, eqns))
        out = []
        for eqn in eqns:
            construct = construct_of(eqn)
            if construct is not None:
                here = passes.at(outer, eqn)
                is_scan = construct.length is not None
                inside = is_scan and here.phase == "backward"
                contexts = (
                    [here] * len(construct.bodies),
                    [inside] * len(construct.bodies),
                )
                eqn = construct.visited(visited, *contexts).equation()
                if frees and is_differentiated(eqn) and _has_calls(eqn):
                    eqn = without_barrier(eqn)
            out.append(eqn)
        return with_equations(jaxpr, out)

    # By the pass alone, whatever the names around, so that what is shared stays so.
    visited = memoized(visit, key=lambda outer, inside: (outer.phase, inside))
    return program.of(visited(program.jaxpr, OUTSIDE, False))


def _multiplies(eqn: JaxprEqn) -> bool:
    """Whether the equation is a product, or holds one outside of remat."""
    if is_differentiated(eqn):
        return False
    if primitive_of(eqn) in (PRODUCT, RAGGED):
        return True
    return any(
        _multiplies(inner) for body in jaxprs_of(eqn) for inner in equations(body)
    )


def _has_calls(eqn: JaxprEqn) -> bool:
    return ops.mark_of(eqn) is not None or any(
        _has_calls(inner) for body in jaxprs_of(eqn) for inner in equations(body)
    )
