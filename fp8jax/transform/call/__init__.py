"""What the user passed: arguments, leaves, modules, and the jit around a function."""

from fp8jax.transform.call._arguments import (
    ArgumentOptions,
    CallKey,
    Static,
    has_static_outputs,
    without_marks,
)
from fp8jax.transform.call._bound import check_function
from fp8jax.transform.call._jit_step import jit_step
from fp8jax.transform.call._leaves import Leaf, leaves_of, positional_names
from fp8jax.transform.call._modules import has_modules
from fp8jax.transform.call._nested_jit import lost_donation, refusing_compiler_options
from fp8jax.transform.call._nnx import NnxCall, pure_jit
from fp8jax.transform.call._outer_jit import OuterJit, outer_jit
from fp8jax.transform.call._parameters import name_of
from fp8jax.transform.call._qtensors import Dequantize, as_arrays
from fp8jax.transform.call._stages import Lowered, Traced, filled
from fp8jax.transform.call._weights import (
    Weights,
    check_weights,
    named_weights,
    weights_after,
)

__all__ = [
    "ArgumentOptions",
    "CallKey",
    "Dequantize",
    "Leaf",
    "Lowered",
    "NnxCall",
    "OuterJit",
    "Static",
    "Traced",
    "Weights",
    "as_arrays",
    "check_function",
    "check_weights",
    "filled",
    "has_modules",
    "has_static_outputs",
    "jit_step",
    "leaves_of",
    "lost_donation",
    "name_of",
    "named_weights",
    "outer_jit",
    "positional_names",
    "pure_jit",
    "refusing_compiler_options",
    "weights_after",
    "without_marks",
]
