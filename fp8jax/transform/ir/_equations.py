"""What single equations say: their primitives' parameters, read in one place.

Constructs aside (`_constructs.py`), these are all parameters of JAX's primitives that
`fp8_transform` reads.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from fp8jax.transform.ir._types import aval_of

PRODUCT, RAGGED = "dot_general", "ragged_dot_general"


def primitive_of(eqn: JaxprEqn) -> str:
    """The name of the equation's primitive, for tables by such names."""
    return eqn.primitive.name


def is_product(eqn: JaxprEqn) -> bool:
    """Whether the equation is a `dot_general`."""
    return eqn.primitive.name == PRODUCT


def dimension_numbers(product: JaxprEqn) -> Any:
    """A product's `dimension_numbers`, as in `jax.lax.dot_general`."""
    return product.params["dimension_numbers"]


def product_options(product: JaxprEqn) -> tuple[Any, Any]:
    """`precision` and `preferred_element_type` of a product, ragged or not."""
    return product.params["precision"], product.params["preferred_element_type"]


class RaggedNumbers(NamedTuple):
    """Dimensions of a `ragged_dot_general`.

    Attributes:
        contracted: of lhs and of rhs.
        batch: of lhs and of rhs.
        rows: of lhs that come in groups.
        groups: of rhs that count them.
    """

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    rows: tuple[int, ...]
    groups: tuple[int, ...]


def ragged_numbers(eqn: JaxprEqn) -> RaggedNumbers | None:
    """The dimensions of a `ragged_dot_general` over all groups, else None."""
    # With an offset it starts at a later group: the kernels count from the first.
    if eqn.primitive.name != RAGGED or eqn.params["group_offset"] is not None:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    return RaggedNumbers(
        (tuple(contracted[0]), tuple(contracted[1])),
        (tuple(batch[0]), tuple(batch[1])),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )


def output_channels(convolution: JaxprEqn) -> int:
    """The number of output channels of a `conv_general_dilated`."""
    kernel = aval_of(convolution.invars[1])
    return kernel.shape[convolution.params["dimension_numbers"].rhs_spec[0]]


def permutation(eqn: JaxprEqn) -> tuple[int, ...]:
    """The permutation of a transposition; () for every other equation."""
    if eqn.primitive.name != "transpose":
        return ()
    return tuple(eqn.params["permutation"])


def gathers_rows(eqn: JaxprEqn) -> bool:
    """Whether the equation gathers whole entries along the first dimension."""
    if eqn.primitive.name != "gather":
        return False
    # A row each: what looks up more of the table, or a part of a row, is no embedding.
    table = aval_of(eqn.invars[0])
    return tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])


def entries_of(eqn: JaxprEqn, before: int) -> Callable[..., jax.Array] | None:
    """Returns how an equation takes whole entries of a stack, if it does.

    Args:
        eqn: the equation, of a stack and perhaps of indices.
        before: the dimensions of the stack before those of its entries.

    Returns:
        The function that takes, with the same indices, entries of another stack of the
        same dimensions before its entries', which may be of other sizes.
    """
    name, params, matrix = eqn.primitive.name, eqn.params, aval_of(eqn.invars[0]).shape
    matrix, out = matrix[before:], aval_of(eqn.outvars[0]).shape
    if name == "squeeze" and max(params["dimensions"], default=0) < before:
        return functools.partial(jax.lax.squeeze, dimensions=params["dimensions"])
    # A part of a matrix has no scales of its own: tiles would be cut.
    if name == "slice" and out[before:] == matrix:
        starts, strides = params["start_indices"], params["strides"]
        limits = params["limit_indices"][:before]

        def sliced(x: jax.Array) -> jax.Array:
            return jax.lax.slice(x, starts, (*limits, *x.shape[before:]), strides)

        return sliced
    if name == "dynamic_slice" and params["slice_sizes"][before:] == matrix:
        sizes = params["slice_sizes"][:before]

        def taken(x: jax.Array, *indices: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, indices, (*sizes, *x.shape[before:]))

        return taken
    return None


def broadcast_dimensions(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """Of a `broadcast_in_dim`, which of the result's its operand's are; else None."""
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) > 1:
        return None
    return tuple(int(dim) for dim in eqn.params["broadcast_dimensions"])


def power_of(eqn: JaxprEqn) -> int | None:
    """Of an `integer_pow`, the power."""
    return int(eqn.params["y"]) if eqn.primitive.name == "integer_pow" else None


def has_default_accuracy(eqn: JaxprEqn) -> bool:
    """Whether the equation asks for no accuracy of its own, as exponentials may."""
    return eqn.params.get("accuracy") is None


def keeps_all_bits(eqn: JaxprEqn) -> bool:
    """Whether the equation is a `reduce_precision` to what its operand has."""
    if eqn.primitive.name != "reduce_precision":
        return False
    info = jnp.finfo(aval_of(eqn.invars[0]).dtype)
    return eqn.params["exponent_bits"] == info.nexp and (
        eqn.params["mantissa_bits"] == info.nmant
    )


def is_placement(eqn: JaxprEqn) -> bool:
    """Whether the equation gives its operand as it is, placed on devices."""
    return eqn.primitive.name in ("mesh_cast", "reshard", "sharding_constraint")


def is_cast(eqn: JaxprEqn) -> bool:
    """Whether the equation gives its operand in another dtype."""
    return eqn.primitive.name == "convert_element_type"


def signature(eqn: JaxprEqn) -> tuple[Hashable, ...]:
    """Equal for equations that compute the same of the same operands."""
    return (eqn.primitive.name, *map(_hashable, sorted(eqn.params.items())))


def _hashable(item: tuple[str, Any]) -> Hashable:
    try:
        hash(item)
    except TypeError:  # Equal to itself alone: that errs on the safe side.
        return item[0], id(item[1])
    return item


def is_differentiated(eqn: JaxprEqn) -> bool:
    """Whether the equation is the backward pass of a remat."""
    # Remat alone has the parameter, and of the forward pass it says False.
    return eqn.params.get("differentiated", False)


def without_barrier(remat: JaxprEqn) -> JaxprEqn:
    """A remat that XLA may merge with what is around it."""
    prevents = remat.params["prevent_cse"]  # One for each operand, or one for all.
    free = (False,) * len(prevents) if isinstance(prevents, tuple) else False
    return remat.replace(params={**remat.params, "prevent_cse": free})


def called_name(eqn: JaxprEqn) -> str:
    """The name of the function that a jit calls."""
    return str(eqn.params["name"])


def asks_what_is_differentiated(call: JaxprEqn) -> bool:
    """Whether the rule of a custom_jvp or custom_vjp equation has `symbolic_zeros`."""
    return call.params["symbolic_zeros"]


def closes_over_arrays(call: JaxprEqn) -> bool:
    """Whether a function with a custom_jvp or custom_vjp closes over arrays."""
    return call.params["num_consts"] > 0
