"""Quantized arrays: `QuantSpec` says how, `quantize` makes a `QTensor`."""

from fp8jax.quant._qtensor import QTensor
from fp8jax.quant._quantize import quantize, quantize_both, requantize
from fp8jax.quant._spec import BLOCK_128X128, TILE_1X128, TILE_128X1, QuantSpec
from fp8jax.quant._statistics import MOMENTS, moments, statistics, sum_moments

__all__ = [
    "BLOCK_128X128",
    "MOMENTS",
    "TILE_1X128",
    "TILE_128X1",
    "QTensor",
    "QuantSpec",
    "moments",
    "quantize",
    "quantize_both",
    "requantize",
    "statistics",
    "sum_moments",
]
