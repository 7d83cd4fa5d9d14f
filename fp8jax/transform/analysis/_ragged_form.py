"""Which of the three products of a layer of experts a `ragged_dot_general` is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.core import ShapedArray
from jax.extend.core import JaxprEqn

from fp8jax import ops
from fp8jax.transform.ir import aval_of, ragged_numbers

# Contracted dimensions of lhs and rhs, and the dimension of rhs that counts groups.
_FORMS: dict[Any, ops.RaggedForm] = {
    ((1,), (1,), (0,)): "fprop",
    ((1,), (2,), (0,)): "dgrad",
    ((0,), (0,), ()): "wgrad",
}


class Ragged(NamedTuple):
    """A product of rows in groups.

    Attributes:
        form: `"fprop"`, `[m, k]` times `[g, k, n]`; `"dgrad"`, `[m, n]` times the
            transposed `[g, k, n]`; or `"wgrad"`, `[m, k]` transposed times `[m, n]`.
        groups: how many there are.
    """

    form: ops.RaggedForm
    groups: int


def ragged_of(eqn: JaxprEqn) -> Ragged | None:
    """What the equation is, if `jax.lax.ragged_dot` or its gradients made it."""
    numbers = ragged_numbers(eqn)
    if numbers is None:
        return None
    lhs, rhs, sizes = (aval_of(x) for x in eqn.invars)
    form = _FORMS.get((*numbers.contracted, numbers.groups))
    plain = numbers.batch == ((), ()) and numbers.rows == (0,)
    ranks = (lhs.ndim, rhs.ndim) == ((2, 2) if form == "wgrad" else (2, 3))
    if form is None or not plain or not ranks or sizes.ndim != 1:
        return None
    return Ragged(form, sizes.shape[0])


def of_marked(avals: Sequence[ShapedArray], out: ShapedArray) -> Ragged | None:
    """Classifies a call of our own product of codes, by its types."""
    rhs = avals[1]
    if rhs.ndim == 3:
        return Ragged("fprop", rhs.shape[0])
    return Ragged("wgrad", out.shape[0]) if out.ndim == 3 else None
