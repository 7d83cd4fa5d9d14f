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
    QuantizeMap,
    Statistics,
)
from fp8jax.transform.lower._chains import Chain, Graph, chain_to, may_be_in_chain
from fp8jax.transform.lower._program import Program
from fp8jax.transform.lower._ragged import ragged_call
from fp8jax.transform.lower._stored_calls import stored_equations

__all__ = [
    "COLLECTED",
    "MAKING_CODES",
    "Chain",
    "Collect",
    "Graph",
    "Layer",
    "Measure",
    "Moments",
    "Multiply",
    "Product",
    "Program",
    "Quantize",
    "QuantizeBoth",
    "QuantizeMap",
    "Statistics",
    "chain_to",
    "may_be_in_chain",
    "ragged_call",
    "stored_equations",
]
