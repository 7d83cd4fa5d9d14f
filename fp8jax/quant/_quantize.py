"""Arrays to quantized arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

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
        TypeError: When differentiated: codes have no derivative. `fake_quantize` passes
            gradients straight through, and `fp8jax.dot_general` is a product with
            gradients. Under `jax.lax.stop_gradient` anything may be quantized.

    Error: `|data * scale - x| <= max(2**-4 * |x|, 2**-10 * scale)` for E4M3. A NaN or
    an infinity in `x` makes its whole tile NaN. float32 subnormals may count as zero.

    Bits: power-of-two scales and their codes are the same on every backend, jitted or
    not. So are float32 scales; of their codes those at a tie of `x / scale` may move by
    a step, as division is rounded differently: few of random numbers, but all copies of
    one that repeats. DeepSeek's own code divides by 448, which makes half of the
    float32 scales an ulp larger or smaller, and no power of two another.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    return quantize_for("quantize", x, spec, implementation)


def quantize_for(
    name: str, x: jax.Array, spec: QuantSpec, implementation: str | None
) -> QTensor:
    """`quantize` on behalf of the function `name`, which errors are about."""
    x = checked(name, x, spec)

    def run(matrix: jax.Array) -> QTensor:
        return _quantize_matrix(name, matrix, spec, implementation)

    *batch, m, k = x.shape
    if batch and m % spec.tile[0] == 0:  # No tile spans two matrices: a tall one.
        q = run(x.reshape(-1, k))
        return jax.tree.map(lambda a: a.reshape(*batch, -1, a.shape[-1]), q)
    return each_matrix(run, x)


def quantize_transposed(
    x: jax.Array,
    spec: QuantSpec = TILE_1X128,
    *,
    implementation: str | None = None,
) -> QTensor:
    """`quantize(x.mT, spec)`, bit for bit, reading `x` as it lies.

    Kernels read the contraction last: this is the way to quantize an operand that is
    stored with it first, at no cost of a transposition.

    Args:
        x: `[..., m, k]` of any float dtype.
        spec: of `x.mT`.
        implementation: as in `quantize`.

    Returns:
        QTensor: `[..., k, m]`.

    Raises:
        ValueError, NotImplementedError, TypeError: As `quantize` does.
    """
    return _quantize_transposed("quantize_transposed", x, spec, implementation)


def _quantize_transposed(
    name: str, x: jax.Array, spec: QuantSpec, implementation: str | None
) -> QTensor:
    x = checked(name, x, spec)

    def run(matrix: jax.Array) -> QTensor:
        return _quantize_matrix(name, matrix, spec, implementation, transposed=True)

    return each_matrix(run, x)


def quantize_both(
    x: jax.Array,
    spec: QuantSpec = TILE_1X128,
    spec_t: QuantSpec = TILE_1X128,
    *,
    implementation: str | None = None,
) -> tuple[QTensor, QTensor]:
    """`quantize(x, spec)` and `quantize(x.mT, spec_t)`, bit for bit, in one read of x.

    What two products need that contract x along one side and along the other: dgrad
    and wgrad of an output gradient, fprop and wgrad of an activation, fprop and dgrad
    of a weight, whose 128x128 codes are then those of its transpose.

    Args:
        x: `[..., m, k]` of any float dtype.
        spec: of `x`.
        spec_t: of `x.mT`. Where more than the tile differs, x is read twice.
        implementation: as in `quantize`.

    Returns:
        QTensors `[..., m, k]` and `[..., k, m]`.

    Raises:
        ValueError, NotImplementedError, TypeError: As `quantize` does.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.2.
    """
    name = "quantize_both"
    x = checked(name, x, spec, spec_t)
    if dataclasses.replace(spec_t, tile=spec.tile) != spec:
        return (
            quantize_for(name, x, spec, implementation),
            _quantize_transposed(name, x, spec_t, implementation),
        )

    def run(matrix: jax.Array) -> tuple[QTensor, QTensor]:
        (data, scale), (data_t, scale_t) = _dispatch.call(
            name,
            matrix,
            implementation=implementation,
            tile=spec.tile,
            tile_t=spec_t.tile,
            dtype=spec.dtype,
            scale=spec.scale,
            eps=spec.eps,
        )
        return QTensor(data, scale, spec.tile), QTensor(data_t, scale_t, spec_t.tile)

    return each_matrix(run, x)


def checked(name: str, x: jax.Array, *specs: QuantSpec) -> jax.Array:
    """`x` as an array; ValueError, on behalf of `name`, if it cannot be quantized."""
    x = jnp.asarray(x)
    for spec in specs:
        if not isinstance(spec, QuantSpec):
            raise ValueError(f"{name} takes a QuantSpec, got {spec!r}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} takes a float array, got dtype {x.dtype}.")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{name} takes an array [..., m, k] of at least one element, got "
            f"x.shape={x.shape}."
        )
    return x


def _quantize_matrix(
    name: str,
    x: jax.Array,
    spec: QuantSpec,
    implementation: str | None,
    **options: bool,
) -> QTensor:
    data, scale = _dispatch.call(
        "quantize",
        x,
        implementation=implementation,
        caller=name,
        tile=spec.tile,
        dtype=spec.dtype,
        scale=spec.scale,
        eps=spec.eps,
        **options,
    )
    return QTensor(data, scale, spec.tile)


def each_matrix(run: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`run` of the arrays' last two dimensions, mapped over the others."""
    for _ in arrays[0].shape[:-2]:
        run = jax.vmap(run)
    return run(*arrays)


def requantize(
    q: QTensor, spec: QuantSpec, *, implementation: str | None = None
) -> QTensor:
    """Quantizes the values of `q` anew, say in tiles that run the other way.

    With power-of-two scales on both sides the codes' mantissas stay, and what is lost
    is what underflows beside larger numbers in a new tile. From 1x128 to 128x1 that is
    1e-6 of all where rows differ in size by 2^4 or less, either way. Where they do by
    2^12 it is 1e-5 of all, but 1 % of the row in the middle, and all of the smallest.
    With float32 scales everything is rounded again: 2 to 3 %.

    Args:
        q: `[..., m, k]`.
        spec: the new tile, format and kind of scale.

    Returns:
        QTensor of the same shape.

    Raises:
        ValueError, NotImplementedError, TypeError: As `quantize` does.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 3.3.3.
    """
    name = "requantize"
    values = _dispatch.undifferentiated(name, q).dequantize()
    return quantize_for(name, values, spec, implementation)
