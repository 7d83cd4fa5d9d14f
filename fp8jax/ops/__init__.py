"""Operations with gradients, given a recipe."""

from fp8jax.matmul import (
    MARK,
    gemm_implementation,
    grouped_implementation,
    has_gpu_kernels,
    mark_of,
    marked,
)
from fp8jax.ops._by_recipe import ByRecipe, attention_products, takes_own_product
from fp8jax.ops._dot_general import dot_general
from fp8jax.ops._einsum import einsum
from fp8jax.ops._expert_mlp import expert_mlp
from fp8jax.ops._gemm import (
    INPUT_DTYPES,
    multiply_operands,
    output_dtype,
    quantize_operand,
    quantize_operand_both,
    quantized_dot,
)
from fp8jax.ops._grouped_product import RaggedForm, quantized_ragged_dot
from fp8jax.ops._layout import Layout, Operand, plan
from fp8jax.ops._moe import moe
from fp8jax.ops._permute import Dispatch, dispatch, permute, unpermute
from fp8jax.ops._product import INPUT_CODES, PRODUCT, WEIGHT_CODES
from fp8jax.ops._ragged_dot import ragged_dot
from fp8jax.ops._rms_norm import rms_norm_dot
from fp8jax.ops._routing import Routing, balanced_bias, check_routing, route
from fp8jax.ops._sides import has_split_codes
from fp8jax.ops._split_codes import multiply_split, split_codes
from fp8jax.ops._spread import (
    Placement,
    Spread,
    axes_of_mesh,
    axes_of_sharding,
    placement,
    placement_of,
    spread,
    spread_of_mesh,
    spread_of_sharding,
)
from fp8jax.ops._static_weight import (
    check_quantized_input,
    static_weight_dot,
    static_weight_rms_norm,
    static_weight_swiglu,
    without_derivative,
)
from fp8jax.ops._swiglu import swiglu_mlp

__all__ = [
    "INPUT_CODES",
    "INPUT_DTYPES",
    "MARK",
    "PRODUCT",
    "WEIGHT_CODES",
    "ByRecipe",
    "Dispatch",
    "Layout",
    "Operand",
    "Placement",
    "RaggedForm",
    "Routing",
    "Spread",
    "attention_products",
    "axes_of_mesh",
    "axes_of_sharding",
    "balanced_bias",
    "check_quantized_input",
    "check_routing",
    "dispatch",
    "dot_general",
    "einsum",
    "expert_mlp",
    "gemm_implementation",
    "grouped_implementation",
    "has_gpu_kernels",
    "has_split_codes",
    "mark_of",
    "marked",
    "moe",
    "multiply_operands",
    "multiply_split",
    "output_dtype",
    "permute",
    "placement",
    "placement_of",
    "plan",
    "quantize_operand",
    "quantize_operand_both",
    "quantized_dot",
    "quantized_ragged_dot",
    "ragged_dot",
    "rms_norm_dot",
    "route",
    "split_codes",
    "spread",
    "spread_of_mesh",
    "spread_of_sharding",
    "static_weight_dot",
    "static_weight_rms_norm",
    "static_weight_swiglu",
    "swiglu_mlp",
    "takes_own_product",
    "unpermute",
    "without_derivative",
]
