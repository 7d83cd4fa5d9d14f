"""Two products and the SwiGLU of them, quantized, in `jnp`."""

import jax

from fp8jax import numerics
from fp8jax.kernels._contract import Quantized
from fp8jax.kernels.xla._gemm import PROMOTION_INTERVAL, gemm
from fp8jax.kernels.xla._swiglu import quantize_swiglu


def gemm_swiglu(
    lhs: jax.Array,
    lhs_scale: jax.Array,
    gate: jax.Array,
    gate_scale: jax.Array,
    up: jax.Array,
    up_scale: jax.Array,
    *,
    lhs_tile: numerics.Tile,
    rhs_tile: numerics.Tile,
    between: jax.typing.DTypeLike,
    dtype: jax.typing.DTypeLike,
    scale: numerics.ScaleKind,
    eps: float,
) -> Quantized:
    """FP8 of `silu(lhs gateᵀ) * (lhs upᵀ)`; see `fp8jax.kernels.GemmSwiglu`."""
    gated, upped = (
        gemm(
            lhs,
            lhs_scale,
            codes,
            factors,
            lhs_tile=lhs_tile,
            rhs_tile=rhs_tile,
            out_dtype=between,
        )
        for codes, factors in ((gate, gate_scale), (up, up_scale))
    )
    tiles = {"tile": (1, PROMOTION_INTERVAL), "tile_t": None}
    ((h, _),) = quantize_swiglu(
        gated, upped, **tiles, dtype=dtype, scale=scale, eps=eps
    )
    assert h is not None
    return h
