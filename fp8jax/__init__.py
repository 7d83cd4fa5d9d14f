"""FP8 quantization, as DeepSeek-V3 does it, as composable JAX transformations."""

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
from fp8jax.recipes import GemmSpec, Recipe

__all__ = [
    "BLOCK_128X128",
    "TILE_1X128",
    "TILE_128X1",
    "GemmSpec",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "__version__",
    "dot_general",
    "numerics",
    "quantize",
    "recipes",
    "requantize",
    "scaled_matmul",
]
