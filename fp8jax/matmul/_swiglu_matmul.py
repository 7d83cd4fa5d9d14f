"""Two products of one `QTensor` and the SwiGLU of them, as a `QTensor`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch
from fp8jax.matmul._checks import check_contraction, check_matrix, check_out
from fp8jax.matmul._scaled_matmul import scaled_matmul
from fp8jax.quant import TILE_1X128, QTensor, QuantSpec, quantize_swiglu


def swiglu_matmul(
    x: QTensor,
    gate: QTensor,
    up: QTensor,
    spec: QuantSpec = TILE_1X128,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> QTensor:
    r"""$silu(x G^T) \odot (x U^T)$ in FP8, for the product that reads it next.

    `scaled_matmul` of x with each matrix, rounded to `dtype`, and `quantize_swiglu` of
    the two. A GPU kernel does it in one launch for up to 64 rows, as in decoding.

    Args:
        x: `[m, k]`, as `scaled_matmul`'s lhs.
        gate, up: `[n, k]`, as `scaled_matmul`'s rhs.
        spec: of the result.
        dtype: bfloat16, float16 or float32, which the products are rounded to.
        implementation: as in `scaled_matmul`.

    Returns:
        QTensor `[m, n]`.

    Raises:
        ValueError: If shapes, tiles or dtypes do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: `fp8jax.ops.swiglu_mlp` has gradients.

    Error: as `scaled_matmul` and `quantize_swiglu`.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    name = "swiglu_matmul"
    check_matrix(name, x=x, gate=gate, up=up)
    for w in (gate, up):
        check_contraction(name, x, w)
    if gate.shape != up.shape:
        raise ValueError(
            f"{name} takes gate and up of one shape, got {gate.shape} and {up.shape}."
        )
    check_out(name, dtype, None, ())
    if spec.tile != TILE_1X128.tile or gate.tile != up.tile:
        how: Any = {"implementation": implementation}
        x, gate, up = _dispatch.undifferentiated(name, (x, gate, up))
        gated, upped = (scaled_matmul(x, w, out_dtype=dtype, **how) for w in (gate, up))
        h, _ = quantize_swiglu(gated, upped, spec, None, **how)
        assert h is not None
        return h
    data, scale = _dispatch.call(
        "gemm_swiglu",
        *(part for q in (x, gate, up) for part in (q.data, q.scale)),
        implementation=implementation,
        caller=name,
        lhs_tile=x.tile,
        rhs_tile=gate.tile,
        between=np.dtype(dtype),
        dtype=spec.dtype,
        scale=spec.scale,
        eps=spec.eps,
    )
    return QTensor(data, scale, spec.tile)
