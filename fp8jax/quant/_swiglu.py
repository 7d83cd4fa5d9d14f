"""SwiGLU and its gradient straight to FP8: what the next products read, and no more."""

import dataclasses

import jax
import jax.numpy as jnp

from fp8jax import _dispatch
from fp8jax.quant._map import Directions, in_both_directions
from fp8jax.quant._quantize import checked, each_matrix
from fp8jax.quant._spec import TILE_1X128, QuantSpec

_INPUT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def quantize_swiglu(
    gate: jax.Array,
    up: jax.Array,
    spec: QuantSpec | None = TILE_1X128,
    spec_t: QuantSpec | None = TILE_1X128,
    *,
    implementation: str | None = None,
) -> Directions:
    r"""FP8 of `silu(gate) * up`, along both sides, in one pass.

    $$h = rne_{dtype(gate)}((g \, \sigma(g)) \, u), \quad
      \sigma(g) = 1 / (1 + e^{-g})$$

    computed in float32, then `quantize(h, spec)` and `quantize(h.mT, spec_t)`: the next
    layer's fprop reads the one, its wgrad the other. Where more than the tile differs
    between the specs, the inputs are read twice.

    Args:
        gate, up: bfloat16, float16 or float32 `[..., m, k]`, of one dtype.
        spec: of h; None to leave it out.
        spec_t: of h.mT; None to leave it out.
        implementation: as in `quantize`.

    Returns:
        QTensors `[..., m, k]` and `[..., k, m]`, None for what was left out.

    Raises:
        ValueError: If dtypes, shapes or specs do not fit.
        NotImplementedError: If the implementation asked for cannot run.
        TypeError: When differentiated: see `quantize`; `fp8jax.ops.swiglu_mlp` has
            gradients.

    Error: h is within `(13 + 1.5 |g|) 2^-24 |h| + (1 + |u| + |g u|) 2^-126` of the
    exact value before its rounding; then as `quantize`. The second part is what is no
    normal number and may count as zero, as sigma(g) is for g below -87. An infinity in
    `gate`, or a NaN anywhere, makes its tiles NaN.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    inputs = {"gate": gate, "up": up}
    (h,) = _quantize("quantize_swiglu", inputs, spec, spec_t, implementation)
    return h


def quantize_swiglu_gradient(
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    spec: QuantSpec | None = TILE_1X128,
    spec_t: QuantSpec | None = TILE_1X128,
    *,
    implementation: str | None = None,
) -> tuple[Directions, Directions]:
    r"""FP8 of the gradients of `silu(gate) * up`, along both sides, in one pass.

    $$dg = dh \, u \, \sigma (1 + g (1 - \sigma)), \quad du = dh \, g \, \sigma$$

    computed in float32 and rounded to the inputs' dtype, then quantized as
    `quantize_swiglu` quantizes h.

    Args:
        dh, gate, up: bfloat16, float16 or float32 `[..., m, k]`, of one dtype.
        spec, spec_t, implementation: as in `quantize_swiglu`.

    Returns:
        What `quantize_swiglu` returns, of dgate and of dup.

    Raises:
        ValueError, NotImplementedError, TypeError: As `quantize_swiglu` does.
    """
    name, inputs = "quantize_swiglu_gradient", {"dh": dh, "gate": gate, "up": up}
    dgate, dup = _quantize(name, inputs, spec, spec_t, implementation)
    return dgate, dup


def _quantize(
    name: str,
    inputs: dict[str, jax.Array],
    spec: QuantSpec | None,
    spec_t: QuantSpec | None,
    implementation: str | None,
) -> tuple[Directions, ...]:
    """The op `name`, each of its results in both directions."""
    asked = spec, spec_t
    given = [s for s in asked if s is not None]
    if not given:
        raise ValueError(f"{name} takes a spec or a spec_t, got None for both.")
    arrays = _checked(name, inputs, given)
    if len({dataclasses.replace(s, tile=given[0].tile) for s in given}) > 1:
        along = _quantize(name, inputs, spec, None, implementation)
        across = _quantize(name, inputs, None, spec_t, implementation)
        return tuple((a, b) for (a, _), (_, b) in zip(along, across, strict=True))

    def run(*matrices: jax.Array) -> tuple[Directions, ...]:
        found = _dispatch.call(
            name,
            *matrices,
            implementation=implementation,
            tile=spec and spec.tile,
            tile_t=spec_t and spec_t.tile,
            dtype=given[0].dtype,
            scale=given[0].scale,
            eps=given[0].eps,
        )
        return tuple(in_both_directions(value, asked) for value in found)

    return each_matrix(run, *arrays)


def _checked(
    name: str, inputs: dict[str, jax.Array], specs: list[QuantSpec]
) -> list[jax.Array]:
    """The inputs as arrays; ValueError, on behalf of `name`, if they do not fit."""
    arrays = [checked(name, x, *specs) for x in inputs.values()]
    dtypes, shapes = {x.dtype for x in arrays}, {x.shape for x in arrays}
    if len(dtypes) > 1 or not dtypes <= set(_INPUT_DTYPES) or len(shapes) > 1:
        came = ", ".join(
            f"{name}={x.dtype}{list(x.shape)}"
            for name, x in zip(inputs, arrays, strict=True)
        )
        raise ValueError(
            f"{name} takes bfloat16, float16 or float32 arrays of one dtype and one "
            f"shape, got {came}."
        )
    return arrays
