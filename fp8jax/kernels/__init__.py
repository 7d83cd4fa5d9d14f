"""FP8 kernels: arrays in, arrays out. One package for each way to lower them."""

from fp8jax.kernels._available import check_available
from fp8jax.kernels._contract import (
    Gemm,
    GemmSwiglu,
    GroupedGemm,
    GroupedGemmK,
    Quantize,
    QuantizeAddRmsNorm,
    QuantizeBoth,
    QuantizeGrouped,
    QuantizeMap,
    QuantizeRmsNorm,
    QuantizeSwiglu,
    QuantizeSwigluGradient,
)

__all__ = [
    "Gemm",
    "GemmSwiglu",
    "GroupedGemm",
    "GroupedGemmK",
    "Quantize",
    "QuantizeAddRmsNorm",
    "QuantizeBoth",
    "QuantizeGrouped",
    "QuantizeMap",
    "QuantizeRmsNorm",
    "QuantizeSwiglu",
    "QuantizeSwigluGradient",
    "check_available",
]
