"""`jax.numpy.einsum` of an activation and a weight, with its three GEMMs in FP8."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from opt_einsum import parser

from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._explicit import check_out_sharding, typed_as
from fp8jax.ops._gemm import check_inputs, recipe_for
from fp8jax.recipes import Recipe, recipe_or_default


def einsum(
    subscripts: str,
    x: jax.Array,
    w: jax.Array,
    /,
    *,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: Any = None,
    recipe: Recipe | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.numpy.einsum(subscripts, x, w)` as one `fp8jax.dot_general`, by `recipe`.

    `jax.numpy.einsum` may hand the operands on in the other order, where that saves a
    transposition; here the first one is always the activation, and the second one,
    which the recipe quantizes as a weight, the weight. Letters of one operand alone
    are summed over, and repeated ones are a diagonal, before anything is quantized.

    Takes `jax.numpy.einsum`'s place in `flax.nnx.Einsum`'s `einsum_op=` as it is.

    Args:
        subscripts: of two operands; an ellipsis will do.
        x: the activation, bfloat16, float16 or float32.
        w: the weight, likewise.
        precision, preferred_element_type, out_sharding, recipe, implementation: as in
            `fp8jax.dot_general`.

    Returns:
        An array of the shape and dtype that `jax.numpy.einsum` gives.

    Raises:
        ValueError: If dtypes, shapes or subscripts do not fit.
        NotImplementedError, TypeError: As `fp8jax.dot_general` does.
    """
    recipe = recipe_or_default("einsum", recipe)
    recipe = recipe_for("einsum", recipe, x, w)
    how: Any = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    plain = functools.partial(jnp.einsum, subscripts, out_sharding=out_sharding, **how)
    if recipe.is_off:
        return plain(x, w)
    check_inputs("einsum", x, w)
    check_out_sharding("einsum", out_sharding, x, w)
    if preferred_element_type is None:
        # Not `dot_general`'s: of float16 and bfloat16 it is float32.
        how["preferred_element_type"] = jnp.promote_types(x.dtype, w.dtype)

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        options = {"recipe": recipe, "implementation": implementation, **how}
        return _as_one_product(subscripts, x, w, **options)

    return typed_as(plain, run, x, w)


def _as_one_product(
    subscripts: str, x: jax.Array, w: jax.Array, **how: Any
) -> jax.Array:
    x_names, w_names, out_names = _parse(subscripts, x, w)
    x, x_names = _distinct(x, x_names, w_names + out_names)
    w, w_names = _distinct(w, w_names, x_names + out_names)
    shared = [name for name in x_names if name in w_names]
    batch = [name for name in shared if name in out_names]
    contracted = [name for name in shared if name not in out_names]
    y = dot_general(
        x,
        w,
        tuple(
            (tuple(map(x_names.index, names)), tuple(map(w_names.index, names)))
            for names in (contracted, batch)
        ),
        **how,
    )
    free = [name for name in x_names + w_names if name not in shared]
    y_names = batch + free
    return lax.transpose(y, tuple(map(y_names.index, out_names)))


def _parse(subscripts: str, x: jax.Array, w: jax.Array) -> tuple[str, str, str]:
    """The letters of the operands and of the result, an ellipsis' among them."""
    try:
        inputs, out, _ = parser.parse_einsum_input((subscripts, x, w))
        x_names, w_names = inputs.split(",")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "einsum takes the subscripts of two operands, as in 'btd,dh->bth', got "
            f"{subscripts!r} for shapes {x.shape} and {w.shape}: {error}"
        ) from None
    return x_names, w_names, out


def _distinct(x: jax.Array, names: str, kept: str) -> tuple[jax.Array, str]:
    """`x` with each letter once, and none that is in neither `kept`."""
    found = "".join(name for name in dict.fromkeys(names) if name in kept)
    return (x, names) if found == names else (jnp.einsum(f"{names}->{found}", x), found)
