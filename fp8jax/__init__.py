"""FP8 quantization, as DeepSeek-V3 does it, as composable JAX transformations.

`fp8jax.linen`, `fp8jax.nnx` and `fp8jax.testing` are loaded when they are first used:
Flax is no requirement of the rest.
"""

import importlib
from types import ModuleType

from fp8jax import numerics, recipes
from fp8jax._version import __version__
from fp8jax.matmul import scaled_matmul
from fp8jax.ops import dot_general
from fp8jax.quant import (
    BLOCK_128X128,
    TILE_1X128,
    TILE_128X1,
    QTensor,
    QuantSpec,
    quantize,
    requantize,
)
from fp8jax.recipes import GemmSpec, Recipe, Rule
from fp8jax.transform import Report, fp8_transform

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
    "dot_general",
    "fp8_transform",
    "numerics",
    "quantize",
    "recipes",
    "requantize",
    "scaled_matmul",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("linen", "nnx", "testing"):
        return importlib.import_module(f"fp8jax.{name}")
    raise AttributeError(f"module 'fp8jax' has no attribute {name!r}")
