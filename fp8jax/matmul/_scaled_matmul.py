"""`QTensor` times `QTensor`."""

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch, numerics
from fp8jax.matmul._checks import (
    CONTRACTION_TILE,
    check_contraction,
    check_matrix,
    check_out,
)
from fp8jax.quant import QTensor, QuantSpec


def scaled_matmul(
    lhs: QTensor,
    rhs: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulate: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""`lhs [m, k]` times `rhs [n, k]` transposed, promoted into FP32 every 128 of k.

    $$out_{ij} = \sum_c s^l_{ic} s^r_{jc} \sum_{k \in c} l_{ik} r_{jk}$$

    Both operands have the contraction last ("nt"), as Hopper's 8-bit matrix units want
    them; `q.T` turns a QTensor around.

    Args:
        lhs: `[m, k]` in tiles of `(1, 128)`, or of any number of rows. A GPU kernel
            takes 128 rows where the rhs has tiles of `(1, 128)`.
        rhs: `[n, k]` in tiles of `(128, 128)` or `(1, 128)`, or of any number of rows.
        out_dtype: bfloat16, float16 or float32; rounded to once, at the end.
        accumulate: float32 `[m, n]` to which a float32 product is added, as in gradient
            accumulation. On a GPU the kernel adds in place where XLA need not keep it
            (donate it, or carry it through a loop), without another pass; a sum below
            2^-126 may become 0 there.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.

    Returns:
        `[m, n]` of `out_dtype`. Row i depends on row i of `lhs` alone. So do its bits,
        whatever m is, where the lhs has a scale for every row; where tiles have more
        rows, XLA:CPU may add up a chunk in another order for another m. For another n
        it may in any case.

    Raises:
        ValueError: If an operand is no matrix, the contractions differ, or a tile does
            not span 128 of the contraction.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: codes have no derivative. `fp8jax.dot_general`
            has gradients.

    Error: float32 accumulation of exact products, then one rounding to `out_dtype`.
    """
    name = "scaled_matmul"
    check_matrix(name, lhs=lhs, rhs=rhs)
    check_contraction(name, lhs, rhs)
    check_out(name, out_dtype, accumulate, (lhs.shape[0], rhs.shape[0]))
    return _dispatch.call(
        "gemm",
        lhs.data,
        lhs.scale,
        rhs.data,
        rhs.scale,
        *(() if accumulate is None else (accumulate,)),
        implementation=implementation,
        caller=name,
        lhs_tile=lhs.tile,
        rhs_tile=rhs.tile,
        out_dtype=np.dtype(out_dtype),
    )


def gemm_implementation(
    lhs_spec: QuantSpec, rhs_spec: QuantSpec, implementation: str | None = None
) -> str:
    """The implementation that multiplies operands of these specs on this machine.

    Args:
        lhs_spec: of `lhs [m, k]`.
        rhs_spec: of `rhs [n, k]`.
        implementation: as in `scaled_matmul`.

    Raises:
        NotImplementedError: If the implementation asked for cannot run here.
    """
    shape = (CONTRACTION_TILE, CONTRACTION_TILE)
    arrays = []
    for spec in (lhs_spec, rhs_spec):
        scales = numerics.scale_shape(shape, spec.tile)
        arrays.append(jax.ShapeDtypeStruct(shape, spec.dtype))
        arrays.append(jax.ShapeDtypeStruct(scales, jnp.float32))
    return _dispatch.resolve(
        "gemm",
        *arrays,
        implementation=implementation,
        lhs_tile=lhs_spec.tile,
        rhs_tile=rhs_spec.tile,
        out_dtype=np.dtype(jnp.bfloat16),
    )
