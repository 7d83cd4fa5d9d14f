"""Removes what no result of a program depends on: the one dead-code elimination."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jax.extend import core
from jax.extend.core import JaxprEqn, Var

from fp8jax import _compat
from fp8jax.transform.ir._types import AnyJaxpr, Atom
from fp8jax.transform.ir._walk import construct_of, memoized, with_equations

Flags = tuple[bool, ...]


def without_dead_code(jaxpr: AnyJaxpr) -> AnyJaxpr:
    """Removes equations whose results nothing reads, in bodies too.

    Loops, branches and calls lose what they carried, stacked or read for those alone.
    Our own calls stay whole, and so does what has side effects. JAX's own pass has no
    rule for `while` before 0.12, and makes our calls anew: no longer known as the
    operations that they are.

    Args:
        jaxpr: whose inputs and results stay.
    """

    def pruned(jaxpr: AnyJaxpr, wanted: Flags) -> tuple[Any, set[Any]]:
        """Returns the jaxpr of the results wanted, and which variables it reads."""
        inner = _compat.open_jaxpr(jaxpr)
        outvars = [x for x, is_it in zip(inner.outvars, wanted, strict=True) if is_it]
        read = _variables(outvars)
        eqns = []
        for eqn in reversed(inner.eqns):
            if eqn.effects or not read.isdisjoint(eqn.outvars):
                eqns.append(live(eqn, read))
                read |= _variables(eqns[-1].invars)
        return with_equations(jaxpr, eqns[::-1], outvars), read

    @memoized
    def visit(body: AnyJaxpr, wanted: Flags) -> tuple[Any, Flags]:
        """Returns the body of the results wanted, and which of its inputs they need."""
        made, read = pruned(body, wanted)
        return made, tuple(v in read for v in _compat.open_jaxpr(body).invars)

    @memoized
    def cut(body: AnyJaxpr, stays: Flags) -> AnyJaxpr:
        """Drops inputs of a body; callers that drop the same ones share the result."""
        invars = _compat.open_jaxpr(body).invars
        left = [v for v, is_it in zip(invars, stays, strict=True) if is_it]
        return body if all(stays) else _compat.with_parts(body, invars=left)

    def live(eqn: JaxprEqn, read: set[Var]) -> JaxprEqn:
        # Not our own calls: with another jaxpr they would no longer be known.
        construct = construct_of(eqn)
        # Effects on mutable arrays name operands by number: theirs must not change.
        if construct is None or _compat.has_input_effects(eqn):
            return eqn
        inputs, results = construct.inputs, construct.results
        carried = [x for x in inputs if x.kind == "carry"]
        wanted = [x.outvar in read for x in results]
        while True:  # Ends: each time one carry more is wanted.
            made = [
                visit(body, tuple(wanted) if construct.returns(i) else _all_of(body))
                for i, body in enumerate(construct.bodies)
            ]
            flags = [iter(needed) for _, needed in made]
            needed = {x: x.kind == "choice" for x in inputs}
            for x in inputs:
                for left, v in zip(flags, x.inner, strict=True):
                    if v is not None:
                        needed[x] |= next(left)
            # A carry that an iteration reads is one that an iteration must give.
            more = [i for i, x in enumerate(carried) if needed[x] and not wanted[i]]
            if not more:
                break
            for i in more:
                wanted[i] = True
        # A carry that nothing after the loop reads stays if an iteration reads it.
        needed |= dict(zip(carried, wanted, strict=False))
        bodies = [
            cut(body, tuple(needed[x] for x in inputs if x.inner[i] is not None))
            for i, (body, _) in enumerate(made)
        ]
        return dataclasses.replace(
            construct,
            bodies=tuple(bodies),
            inputs=tuple(x for x in inputs if needed[x]),
            results=tuple(x for x, is_it in zip(results, wanted, strict=True) if is_it),
        ).equation()

    return pruned(jaxpr, _all_of(jaxpr))[0]


def _all_of(jaxpr: AnyJaxpr) -> Flags:
    return (True,) * len(_compat.open_jaxpr(jaxpr).outvars)


def _variables(atoms: Iterable[Atom]) -> set[Var]:
    return {x for x in atoms if isinstance(x, core.Var)}
