"""Writes nested jitted functions that hold matrix products out where they are called.

`jnp.einsum` and others jit themselves. A value that two of them multiply by, or that a
forward and a backward call share, is then one variable of one jaxpr: it is quantized
once for all of them.

A function with a gradient rule of its own is written out where its derivative is taken
already, for there the rule means nothing any more: in the forward half of its own rule,
say, which may call the function itself, as those in JAX's documentation do.
"""

from jax.extend.core import Var

from fp8jax import _compat, ops
from fp8jax.transform.ir import (
    PRODUCT,
    RAGGED,
    AnyJaxpr,
    Atom,
    construct_of,
    equations,
    jaxprs_of,
    memoized,
    primitive_of,
    read,
    reading,
    written_out,
)
from fp8jax.transform.lower import Program


def inline(program: Program) -> Program:
    """Writes out calls of plain jitted functions that hold products.

    Names of the equations within get those of the call before them. A function with
    shardings, donation or compiler options of its own stays a call, and so do ours.
    Functions with a gradient rule are written out in a program of which all derivatives
    are taken already (`Program.is_rule`), and where names say that they are.
    """

    @memoized
    def has_products(jaxpr: AnyJaxpr) -> bool:
        return any(
            # Ours hold products that are in FP8 already: T(T(f)) leaves them whole.
            primitive_of(eqn) in (PRODUCT, RAGGED)
            or (ops.mark_of(eqn) is None and any(map(has_products, jaxprs_of(eqn))))
            for eqn in equations(jaxpr)
        )

    @memoized
    def visit(jaxpr: AnyJaxpr, differentiated: bool) -> AnyJaxpr:
        if not has_products(jaxpr):
            return jaxpr
        env: dict[Var, Atom] = {}
        eqns = []
        for old in equations(jaxpr):
            eqn = reading(old, env)
            # Under a `jvp` or `transpose` the derivative is taken: the rule beside the
            # function means nothing any more.
            names = _compat.names_of(eqn)
            within = differentiated or any(part.is_derivative for part in names)
            construct = construct_of(eqn, with_rules=within)
            # Without products, writing out would only make the program longer.
            if (
                construct is None
                or (construct.is_fixed and not construct.is_plain)
                or not any(map(has_products, construct.bodies))
            ):
                eqns.append(eqn)
                continue
            construct = construct.visited(visit, [within] * len(construct.bodies))
            if not construct.is_plain:
                eqns.append(construct.equation())
                continue
            made, results = written_out(construct)
            eqns += made
            env.update(zip(eqn.outvars, results, strict=True))
        outvars = [read(x, env) for x in _compat.open_jaxpr(jaxpr).outvars]
        return _compat.with_parts(jaxpr, eqns=eqns, outvars=outvars)

    return program.of(visit(program.jaxpr, program.is_rule))
