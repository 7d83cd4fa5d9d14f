"""Which of the three products of a layer of experts a `ragged_dot_general` is."""

from typing import Any, NamedTuple

from fp8jax import ops

RAGGED = "ragged_dot_general"

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


def ragged_of(eqn: Any) -> Ragged | None:
    """What the equation is, if `jax.lax.ragged_dot` or its gradients made it."""
    if eqn.primitive.name != RAGGED or eqn.params["group_offset"] is not None:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, batch), rows = (
        numbers.dot_dimension_numbers,
        numbers.lhs_ragged_dimensions,
    )
    lhs, rhs, sizes = (x.aval for x in eqn.invars)
    dims = (*map(tuple, contracted), tuple(numbers.rhs_group_dimensions))
    form = _FORMS.get(dims)
    plain = tuple(map(tuple, batch)) == ((), ()) and tuple(rows) == (0,)
    ranks = (lhs.ndim, rhs.ndim) == ((2, 2) if form == "wgrad" else (2, 3))
    if form is None or not plain or not ranks or sizes.ndim != 1:
        return None
    return Ragged(form, sizes.shape[0])


def of_marked(avals: Any, out: Any) -> Ragged | None:
    """The same of a call of our own products of codes."""
    rhs = avals[1]
    if rhs.ndim == 3:
        return Ragged("fprop", rhs.shape[0])
    return Ragged("wgrad", out.shape[0]) if out.ndim == 3 else None
