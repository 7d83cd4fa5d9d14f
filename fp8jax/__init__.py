"""FP8 quantization, as DeepSeek-V3 does it, as composable JAX transformations.

`fp8jax.checkpoint`, `linen`, `nnx`, `testing` and `tune` are loaded when they are first
used: Flax is no requirement of the rest, and Pallas takes long to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fp8jax import checkpoint_policies, numerics, recipes
from fp8jax._version import __version__
from fp8jax.matmul import scaled_matmul
from fp8jax.ops import dot_general, ragged_dot
from fp8jax.quant import (
    BLOCK_128X128,
    TILE_1X128,
    TILE_128X1,
    QTensor,
    QuantSpec,
    fake_quantize,
    quantize,
    quantize_both,
    requantize,
)
from fp8jax.recipes import GemmSpec, Recipe, Rule
from fp8jax.transform import Report, fp8_transform

if TYPE_CHECKING:
    from fp8jax.testing import assert_fp8_lowered
    from fp8jax.tune import load_tuning

__all__ = [
    "BLOCK_128X128",
    "TILE_1X128",
    "TILE_128X1",
    "GemmSpec",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Report",
    "Rule",
    "__version__",
    "assert_fp8_lowered",
    "checkpoint_policies",
    "dot_general",
    "fake_quantize",
    "fp8_transform",
    "load_tuning",
    "numerics",
    "quantize",
    "quantize_both",
    "ragged_dot",
    "recipes",
    "requantize",
    "scaled_matmul",
]


def __getattr__(name: str) -> Any:
    if name == "assert_fp8_lowered":
        return importlib.import_module("fp8jax.testing").assert_fp8_lowered
    if name == "load_tuning":
        return importlib.import_module("fp8jax.tune").load_tuning
    if name in ("checkpoint", "linen", "nnx", "testing", "tune"):
        return importlib.import_module(f"fp8jax.{name}")
    raise AttributeError(f"module 'fp8jax' has no attribute {name!r}")
