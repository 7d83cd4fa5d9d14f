"""Quantized values as an array with a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _dispatch, numerics
from fp8jax.quant._quantize import quantize_for
from fp8jax.quant._spec import TILE_1X128, QuantSpec

_NAME = "fake_quantize"
_DTYPES = tuple(map(np.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))


def fake_quantize(
    x: jax.Array,
    spec: QuantSpec = TILE_1X128,
    *,
    implementation: str | None = None,
) -> jax.Array:
    r"""What `quantize(x, spec)` stands for, with a gradient straight through.

    $$y = data \cdot scale, \quad \partial L / \partial x := \partial L / \partial y$$

    Rounding is a step function: its derivative is zero where it has one, and nothing
    could be trained through it. The one given here is that of the identity, in the
    dtype of x, whatever the rounding did: no element is masked, because none is clipped
    (a tile's scale comes from its largest element). It is an estimate, to be used where
    x is trained so that it survives quantization; a product whose operands and
    gradients are in FP8 is `fp8jax.dot_general`.

    Args:
        x: `[..., m, k]`, bfloat16, float16, float32 or float64.
        spec: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        `[..., m, k]` in the dtype of x: `quantize(x, spec).dequantize(x.dtype)`, also
        where XLA would drop a cast to FP8 and back.

    Raises:
        ValueError, NotImplementedError: As `quantize` does.

    Error: that of `quantize`, and of one rounding to the dtype of x.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation, arXiv:1308.3432.

    Example:
        >>> x = jnp.array([[1.0, 1.03]])
        >>> fake_quantize(x).tolist()
        [[1.0, 1.0]]
        >>> jax.grad(lambda x: (3 * fake_quantize(x)).sum())(x).tolist()
        [[3.0, 3.0]]
    """
    x = jnp.asarray(x)
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{_NAME} takes a bfloat16, float16, float32 or float64 array, got dtype "
            f"{x.dtype}."
        )
    if x.ndim >= 2 and not x.size:
        return x
    return _run(x, spec=spec, implementation=implementation)


def _straight_through(
    x: jax.Array, *, spec: QuantSpec, implementation: str | None
) -> jax.Array:
    @jax.custom_jvp
    def values(x: jax.Array) -> jax.Array:
        decoded = quantize_for(_NAME, x, spec, implementation).dequantize()
        if x.dtype.itemsize == 2:
            return numerics.round_to(decoded, x.dtype)
        return decoded.astype(x.dtype)

    values.defjvps(lambda tangent, y, x: tangent)
    return values(x)


_run = _dispatch.marked(
    _NAME, _straight_through, static_argnames=("spec", "implementation")
)
