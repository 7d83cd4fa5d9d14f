"""Quantized arrays: `QuantSpec` says how, `quantize` makes a `QTensor`."""

from fp8jax.quant._fake_quantize import fake_quantize
from fp8jax.quant._grouped import grouped_columns, quantize_grouped
from fp8jax.quant._map import maps_like_quantize, quantize_map
from fp8jax.quant._place import contraction_minor
from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._quantize import (
    quantize,
    quantize_both,
    quantize_transposed,
    requantize,
)
from fp8jax.quant._rms_norm import quantize_add_rms_norm, quantize_rms_norm
from fp8jax.quant._spec import BLOCK_128X128, TILE_1X128, TILE_128X1, QuantSpec
from fp8jax.quant._statistics import MOMENTS, moments, statistics, sum_moments
from fp8jax.quant._swiglu import quantize_swiglu, quantize_swiglu_gradient

__all__ = [
    "BLOCK_128X128",
    "MOMENTS",
    "TILE_1X128",
    "TILE_128X1",
    "QTensor",
    "QuantSpec",
    "contraction_minor",
    "fake_quantize",
    "grouped_columns",
    "maps_like_quantize",
    "moments",
    "quantize",
    "quantize_add_rms_norm",
    "quantize_both",
    "quantize_grouped",
    "quantize_map",
    "quantize_rms_norm",
    "quantize_swiglu",
    "quantize_swiglu_gradient",
    "quantize_transposed",
    "requantize",
    "statistics",
    "sum_moments",
]
