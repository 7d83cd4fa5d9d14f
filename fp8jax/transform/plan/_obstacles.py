"""Why a product cannot be in FP8, whatever the user asks for."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fp8jax import _compat, ops
from fp8jax.transform.analysis import Assignment, Dot
from fp8jax.transform.plan._names import layers_of
from fp8jax.transform.plan._rows import first_side

# Of an entry of a batch of products: as many as a tile along tokens has.
_FEWEST_ROWS = 128


def unsupported(dot: Dot) -> str:
    """Why no GEMM in FP8 can stand in for this product."""
    if dot.scope.blocked:
        return dot.scope.blocked
    if not dot.is_product:
        return f"{dot.primitive}: no FP8 kernel for it yet"
    for aval in (dot.lhs_aval, dot.rhs_aval, dot.out_aval):
        dtype = aval.dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
            return f"already FP8: {dtype}"
        if dtype not in ops.INPUT_DTYPES:
            return f"dtype {dtype}"
        if not aval.size:
            return "no elements"
    if _compat.is_explicit(dot.out_aval):
        if dot.ragged is not None:
            return "ragged_dot with explicit sharding"
        sharding = dot.out_aval.sharding
        if set(sharding.mesh.axis_types) != {jax.sharding.AxisType.Explicit}:
            return "explicit sharding on a mesh of several axis types"
        if sharding.spec.unreduced:
            return "explicit sharding with unreduced axes"
    return ""


def in_batch(a: Assignment) -> str:
    """Why no batch of GEMMs in FP8 can stand in for a product, if it is a batch.

    Each entry's weight is read and quantized for the rows of that entry alone.
    """
    if not a.dot.has_batch:
        return ""
    rows = a.dot.contraction if a.role == "wgrad" else a.dot.free(first_side(a))
    if rows >= _FEWEST_ROWS:
        return ""
    return (
        f"a batch of {a.dot.batch} weights for {rows} rows each: under {_FEWEST_ROWS} "
        "quantizing the weights costs more than FP8 saves"
    )


def another_form(a: Assignment) -> str:
    """Why a product of rows in groups is none of those that have a kernel, if so."""
    ragged = a.dot.ragged
    if ragged is None:
        return ""
    is_wgrad = a.role == "wgrad"
    if is_wgrad == (ragged.form == "wgrad") and (is_wgrad or a.side == "rhs"):
        return ""
    return f"ragged_dot: a {a.role} whose weight is no matrix for each group"


def layer_obstacles(assignments: Sequence[Assignment]) -> dict[int, str]:
    """By weight, why its forward products cannot be in FP8, or `""`.

    A gradient is in FP8 only if its layer's forward product can be.
    """
    obstacles: dict[int, str] = {}
    for a in assignments:
        if a.weight is None or a.role not in ("fprop", "recompute"):
            continue
        # A weight used twice is in reach if one of its products is.
        for layer in layers_of(a):
            if obstacles.get(layer, "unknown"):
                obstacles[layer] = unsupported(a.dot) or in_batch(a)
    return obstacles
