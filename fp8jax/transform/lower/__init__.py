"""The operations in FP8 that products become."""

from fp8jax.transform.lower._calls import (
    COLLECTED,
    MAKING_CODES,
    Collect,
    Layer,
    Measure,
    Moments,
    Multiply,
    Product,
    Quantize,
    QuantizeBoth,
    Statistics,
)
from fp8jax.transform.lower._program import Program
from fp8jax.transform.lower._ragged import ragged_call
from fp8jax.transform.lower._stored_calls import stored_equations

__all__ = [
    "COLLECTED",
    "MAKING_CODES",
    "Collect",
    "Layer",
    "Measure",
    "Moments",
    "Multiply",
    "Product",
    "Program",
    "Quantize",
    "QuantizeBoth",
    "Statistics",
    "ragged_call",
    "stored_equations",
]
