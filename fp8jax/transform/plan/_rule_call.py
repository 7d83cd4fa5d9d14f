"""A function with a gradient rule of its own, as jaxprs: itself, its rule's two halves.

A `custom_jvp` comes as the `custom_vjp` that JAX's transposition makes of it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import JaxprEqn

from fp8jax import _compat
from fp8jax.quant import MOMENTS, sum_moments
from fp8jax.transform.analysis import Role
from fp8jax.transform.ir import jaxprs_of
from fp8jax.transform.plan._statistics import over_iterations

Measured: TypeAlias = tuple[tuple[str, Role], int | None]


@dataclasses.dataclass(frozen=True, eq=False)
class RuleCall:
    """A call of a `jax.custom_vjp` function of arrays, with what it evaluates.

    Attributes:
        name: of the function.
        primal: of operands to results.
        forward: of operands to results, then residuals.
        backward: of residuals, then cotangents of the results that have some, to those
            of the operands that have some.
        takes: for each operand whether it has a cotangent.
        gives: for each result whether it has one.
        moments: for `"primal"` and `"forward"`, path and role of each product that is
            measured there, and which of the moments after its other results those are.
    """

    name: str
    primal: Any
    forward: Any
    backward: Any
    takes: tuple[bool, ...]
    gives: tuple[bool, ...]
    moments: Mapping[str, Sequence[Measured]] = dataclasses.field(default_factory=dict)

    @property
    def measured(self) -> tuple[tuple[str, Role], ...]:
        """Path and role of each of the moments after a call's other results."""
        known = (name for part in self.moments.values() for name, _ in part)
        return tuple(dict.fromkeys(known))

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "RuleCall":
        """Traces the rule of the function that an equation calls.

        Raises:
            Exception: whatever the user's rule raises when it is traced.
        """
        takes, gives = map(_differentiable, (eqn.invars, eqn.outvars))
        pullbacks = []

        def forward(*operands: jax.Array) -> Any:
            primals, others = _parted(operands, takes)

            def run(*primals: jax.Array) -> Any:
                results = _compat.bind(eqn, *_merged(primals, others, takes))
                return _parted(results, gives)

            results, pullback, rest = jax.vjp(run, *primals, has_aux=True)
            residuals, structure = jax.tree.flatten(pullback)
            pullbacks.append(structure)
            return _merged(results, rest, gives), residuals

        def backward(
            residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array]
        ) -> Any:
            return jax.tree.unflatten(pullbacks[-1], residuals)(tuple(cotangents))

        forward_jaxpr = jax.make_jaxpr(forward)(*(x.aval for x in eqn.invars))
        residuals = forward_jaxpr.out_avals[len(gives) :]
        cotangents, _ = _parted([x.aval for x in eqn.outvars], gives)
        backward_jaxpr = jax.make_jaxpr(backward)(residuals, cotangents)
        name, primal = _compat.function_name(eqn), jaxprs_of(eqn)[0]
        return cls(name, primal, forward_jaxpr, backward_jaxpr, takes, gives)

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        """The function's results, and the moments of `measured`."""
        n_results = len(self.gives)
        # What the rule's second half reads: residuals, then cotangents.
        n_residuals = len(_compat.open_jaxpr(self.backward).invars) - sum(self.gives)

        def primal(*operands: jax.Array) -> list[jax.Array]:
            made = core.jaxpr_as_fun(self.primal)(*operands)
            return made[:n_results] + self._totals("primal", made[n_results:])

        def forward(*operands: jax.Array) -> Any:
            made = core.jaxpr_as_fun(self.forward)(*operands)
            results, rest = made[:n_results], made[n_results:]
            residuals, moments = rest[:n_residuals], rest[n_residuals:]
            return results + self._totals("forward", moments), residuals

        def backward(
            residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array]
        ) -> Any:
            given, _ = _parted(cotangents[:n_results], self.gives)
            made = core.jaxpr_as_fun(self.backward)(*residuals, *given)
            nothing = [None] * self.takes.count(False)
            return tuple(_merged(made, nothing, self.takes))

        primal.__name__ = primal.__qualname__ = self.name
        function = jax.custom_vjp(primal)
        function.defvjp(forward, backward)
        return function(*operands)

    def _totals(self, part: str, moments: Sequence[jax.Array]) -> list[jax.Array]:
        """`[2, 6]` of all iterations together, zeros where nothing is measured."""
        totals = []
        for name in self.measured:
            several = [
                over_iterations(moments[i])
                for known, i in self.moments[part]
                if known == name and i is not None
            ]
            totals.append(sum_moments(several or [jnp.zeros((2, len(MOMENTS)))]))
        return totals


def _differentiable(variables: Iterable[Any]) -> tuple[bool, ...]:
    return tuple(jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in variables)


def _parted(xs: Sequence[Any], which: Sequence[bool]) -> tuple[tuple[Any, ...], ...]:
    """Splits `xs` into the selected elements and the rest."""
    pairs = list(zip(xs, which, strict=True))
    return tuple(x for x, is_it in pairs if is_it), tuple(x for x, i in pairs if not i)


def _merged(
    chosen: Iterable[Any], others: Iterable[Any], which: Sequence[bool]
) -> list[Any]:
    """Undoes `_parted`."""
    left, right = iter(chosen), iter(others)
    return [next(left) if is_it else next(right) for is_it in which]
