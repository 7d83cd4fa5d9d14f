"""Arrays to quantized arrays."""

import jax
import jax.numpy as jnp

from fp8jax import _dispatch
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._spec import TILE_1X128, QuantSpec


def quantize(
    x: jax.Array,
    spec: QuantSpec = TILE_1X128,
    *,
    implementation: str | None = None,
) -> QTensor:
    r"""Quantizes the last two dimensions of `x` with one float32 scale a tile.

    For each tile $T$, with $q_{max}$ the largest finite value of `spec.dtype`,

    $$s_T = \max(\max_T |x| \cdot q_{max}^{-1}, 2^{-126}), \quad
      data = rne(clip(x / s_T, \pm q_{max}))$$

    where `spec.scale == "pow2"` rounds $s_T$ up to a power of two first. An all-zero
    tile has scale 1. Edge tiles are zero-padded.

    Args:
        x: `[..., m, k]` of any float dtype; taken to float32.
        spec: tile, format and kind of scale.
        implementation: `"xla"`, `"mosaic_gpu"`, or None for the best one here.

    Returns:
        QTensor: `data [..., m, k]` and `scale [..., ceil(m / tile[0]), ceil(k /
        tile[1])]`.

    Raises:
        ValueError: If `x` has fewer than two dimensions, no element, or no float dtype.
        NotImplementedError: If the implementation asked for cannot run.

    Error: `|data * scale - x| <= max(2**-4 * |x|, 2**-10 * scale)` for E4M3. A NaN or
    an infinity in `x` makes its whole tile NaN. Not differentiable: gradients of
    quantized products come from `fp8jax.dot_general`.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    x = jnp.asarray(x)
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"quantize takes a QuantSpec, got {spec!r}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize takes a float array, got dtype {x.dtype}.")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            "quantize takes an array [..., m, k] of at least one element, got "
            f"x.shape={x.shape}."
        )

    def run(matrix: jax.Array) -> QTensor:
        data, scale = _dispatch.call(
            "quantize",
            matrix,
            implementation=implementation,
            tile=spec.tile,
            dtype=spec.dtype,
            scale=spec.scale,
            eps=spec.eps,
        )
        return QTensor(data, scale, spec.tile)

    *batch, m, k = x.shape
    if not batch:
        return run(x)
    if m % spec.tile[0] == 0:  # No tile spans two matrices: one tall matrix.
        q = run(x.reshape(-1, k))
        return jax.tree.map(lambda a: a.reshape(*batch, -1, a.shape[-1]), q)
    for _ in batch:
        run = jax.vmap(run)
    return run(x)


def quantize_both(
    x: jax.Array,
    specs: tuple[QuantSpec, QuantSpec],
    *,
    implementation: str | None = None,
) -> tuple[QTensor, QTensor]:
    """One matrix in tiles of two shapes, each straight from `x`; see `quantize`.

    A layer's input goes into two products that contract different dimensions of it,
    and so does its output's gradient.

    Args:
        x: `[..., m, k]` of any float dtype.
        specs: such as `(TILE_1X128, TILE_128X1)`.
        implementation: as in `quantize`.

    Returns:
        What `quantize` gives for each of `specs`, bit for bit.
    """
    # NOTE: two reads of `x`; a kernel with both outputs belongs here.
    first, second = (quantize(x, s, implementation=implementation) for s in specs)
    return first, second


def requantize(
    q: QTensor, spec: QuantSpec, *, implementation: str | None = None
) -> QTensor:
    """Quantizes the values of `q` anew, say in tiles that run the other way.

    With power-of-two scales on both sides this is all but lossless (6.7e-7 relative
    error against 2 % with float32 scales), because the codes' mantissas stay.

    Args:
        q: `[..., m, k]`.
        spec: the new tile, format and kind of scale.

    Returns:
        QTensor of the same shape.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.3.
    """
    return quantize(q.dequantize(), spec, implementation=implementation)
