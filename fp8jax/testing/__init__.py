"""Oracles, data and named shapes for tests and benchmarks of quantized code."""

from fp8jax.testing._assertions import (
    assert_codes_differ_by_last_bits,
    assert_product_within_float32,
    assert_same_bits,
)
from fp8jax.testing._configs import every_gemm_config
from fp8jax.testing._data import (
    ALL_BF16,
    ALL_FP16,
    bad_positions,
    distinct_scales,
    lognormal_tokens,
    positive_uniform,
    random_codes,
)
from fp8jax.testing._lowered import assert_fp8_lowered
from fp8jax.testing._oracle import gemm_float64, quantize_numpy
from fp8jax.testing._shapes import EDGE_SIZES, GEMM_SHAPES, GemmShape

__all__ = [
    "ALL_BF16",
    "ALL_FP16",
    "EDGE_SIZES",
    "GEMM_SHAPES",
    "GemmShape",
    "assert_codes_differ_by_last_bits",
    "assert_fp8_lowered",
    "assert_product_within_float32",
    "assert_same_bits",
    "bad_positions",
    "distinct_scales",
    "every_gemm_config",
    "gemm_float64",
    "lognormal_tokens",
    "positive_uniform",
    "quantize_numpy",
    "random_codes",
]
