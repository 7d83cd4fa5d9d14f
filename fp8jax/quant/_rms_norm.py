"""RMS normalization straight to FP8."""

import jax
import jax.numpy as jnp

from fp8jax import _dispatch
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._quantize import checked
from fp8jax.quant._spec import TILE_1X128, QuantSpec


def quantize_rms_norm(
    x: jax.Array,
    weight: jax.Array,
    spec: QuantSpec = TILE_1X128,
    *,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> tuple[QTensor, jax.Array]:
    r"""FP8 of `x / rms(x) * weight`, in one read of `x`.

    $$r_i = (\textstyle\frac{1}{k} \sum_j x_{ij}^2 + \epsilon)^{-1/2}, \quad
    h_{ij} = rne_{dtype(x)}((x_{ij} r_i) w_j)$$

    computed in float32, then `quantize(h, spec)`.

    Args:
        x: bfloat16, float16 or float32 `[..., m, k]`.
        weight: `[k]` of any float dtype.
        spec: of h.
        epsilon: added to the mean of squares.
        implementation: as in `quantize`.

    Returns:
        QTensor `[..., m, k]`, and float32 r `[..., m]`, which the gradient needs.

    Raises:
        ValueError: If dtypes or shapes do not fit.
        NotImplementedError: If the implementation asked for cannot run.

    Error: r is within k 2^-24 of the exact one, relatively; then as `quantize`. A row
    with a NaN or an infinity, or whose squares' sum overflows, is NaN.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    name = "quantize_rms_norm"
    x, weight = checked(name, x, spec), jnp.asarray(weight)
    if weight.shape != x.shape[-1:] or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{name} takes a float weight of the shape of the last side of x, got "
            f"weight={weight.dtype}{list(weight.shape)} for x.shape={x.shape}."
        )
    *batch, m, k = x.shape
    # One tall matrix, unless a tile of it would span two.
    rows = m if m % spec.tile[0] else x.size // k
    matrices = x.reshape(-1, rows, k)

    def run(matrix: jax.Array) -> tuple[QTensor, jax.Array]:
        (data, scale), inverse_rms = _dispatch.call(
            name,
            matrix,
            weight,
            implementation=implementation,
            epsilon=epsilon,
            tile=spec.tile,
            dtype=spec.dtype,
            scale=spec.scale,
            eps=spec.eps,
        )
        return QTensor(data, scale, spec.tile), inverse_rms

    q, inverse_rms = jax.vmap(run)(matrices) if len(matrices) > 1 else run(matrices[0])
    q = jax.tree.map(lambda a: a.reshape(*batch, -1, a.shape[-1]), q)
    return q, inverse_rms.reshape(*batch, m)
