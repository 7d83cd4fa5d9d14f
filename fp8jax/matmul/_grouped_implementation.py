"""Which kernel multiplies rows in groups on this machine."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch, numerics
from fp8jax.quant import QuantSpec

_SIDE = 128  # Of the matrices that stand in for any.


def grouped_implementation(
    op: Literal["grouped_matmul", "grouped_wgrad"],
    lhs_spec: QuantSpec,
    rhs_spec: QuantSpec,
    implementation: str | None = None,
) -> str:
    """The implementation that multiplies operands of these specs on this machine.

    Args:
        op: name of the function that multiplies.
        lhs_spec, rhs_spec: of its operands.
        implementation: as in that function.

    Raises:
        NotImplementedError: If the implementation asked for cannot run here.
    """
    lhs_shape = rhs_shape = (_SIDE, _SIDE)
    if op == "grouped_matmul":
        rhs_shape = (1, *rhs_shape)
    arrays = []
    for shape, spec in ((lhs_shape, lhs_spec), (rhs_shape, rhs_spec)):
        arrays.append(jax.ShapeDtypeStruct(shape, spec.dtype))
        scales = numerics.scale_shape(shape, spec.tile)
        arrays.append(jax.ShapeDtypeStruct(scales, jnp.float32))
    return _dispatch.resolve(
        "grouped_gemm" if op == "grouped_matmul" else "grouped_gemm_k",
        *arrays,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        implementation=implementation,
        lhs_tile=lhs_spec.tile,
        rhs_tile=rhs_spec.tile,
        out_dtype=np.dtype(jnp.bfloat16),
    )
