"""RMS normalization straight to FP8."""

from typing import Any

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
        TypeError: When differentiated: see `quantize`; `fp8jax.ops.rms_norm_dot` has
            gradients.

    Error: r is within (k + 4) 2^-24 of the exact one, relatively; then as `quantize`. A
    row with a NaN or an infinity, or whose squares' sum overflows, is NaN.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    x, weight = _checked("quantize_rms_norm", x, weight, spec)
    how: Any = {"epsilon": epsilon, "implementation": implementation}
    return _normalized("quantize_rms_norm", (x,), weight, spec, how)


def quantize_add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    spec: QuantSpec = TILE_1X128,
    *,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> tuple[QTensor, jax.Array, jax.Array]:
    """`quantize_rms_norm(x + residual, ...)` and the sum, in one read of both.

    What stands between two blocks of a decoder: the sum is the next residual.

    Args:
        x, residual: bfloat16, float16 or float32 `[..., m, k]`, of one dtype.
        weight, spec, epsilon, implementation: as in `quantize_rms_norm`.

    Returns:
        QTensor `[..., m, k]`, float32 r `[..., m]`, and the sum `[..., m, k]`, rounded
        to the dtype of x.

    Raises:
        ValueError, NotImplementedError, TypeError: As `quantize_rms_norm` does.
    """
    name = "quantize_add_rms_norm"
    x, weight = _checked(name, x, weight, spec)
    residual = jnp.asarray(residual)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{name} takes x and a residual of one shape and dtype, got "
            f"{x.dtype}{list(x.shape)} and {residual.dtype}{list(residual.shape)}."
        )
    how: Any = {"epsilon": epsilon, "implementation": implementation}
    q, inverse_rms, total = _normalized(name, (x, residual), weight, spec, how)
    return q, inverse_rms, total.reshape(x.shape)


def _checked(
    name: str, x: jax.Array, weight: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    x, weight = checked(name, x, spec), jnp.asarray(weight)
    if weight.shape != x.shape[-1:] or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{name} takes a float weight of the shape of the last side of x, got "
            f"weight={weight.dtype}{list(weight.shape)} for x.shape={x.shape}."
        )
    return x, weight


def _normalized(
    name: str,
    inputs: tuple[jax.Array, ...],
    weight: jax.Array,
    spec: QuantSpec,
    how: dict[str, Any],
) -> tuple[Any, ...]:
    """The op `name` of each matrix; what it returns besides, with its sides."""
    *batch, m, k = inputs[0].shape
    # One tall matrix, unless a tile of it would span two.
    rows = m if m % spec.tile[0] else inputs[0].size // k
    matrices = [x.reshape(-1, rows, k) for x in inputs]

    def run(*matrix: jax.Array) -> tuple[Any, ...]:
        (data, scale), *others = _dispatch.call(
            name,
            *matrix,
            weight,
            tile=spec.tile,
            dtype=spec.dtype,
            scale=spec.scale,
            eps=spec.eps,
            **how,
        )
        return QTensor(data, scale, spec.tile), *others

    several = len(matrices[0]) > 1
    out = jax.vmap(run)(*matrices) if several else run(*(x[0] for x in matrices))
    q, inverse_rms, *others = out
    q = jax.tree.map(lambda a: a.reshape(*batch, -1, a.shape[-1]), q)
    return q, inverse_rms.reshape(*batch, m), *others
