"""Checkpoints in DeepSeek-V3's format: FP8 weights with a scale for each tile."""

from fp8jax.checkpoint._compare import Difference, code_histogram, diff
from fp8jax.checkpoint._error import CheckpointError
from fp8jax.checkpoint._experts import stack_experts, unstack_experts
from fp8jax.checkpoint._load import load
from fp8jax.checkpoint._offline import dequantize_checkpoint, quantize_checkpoint
from fp8jax.checkpoint._reader import Reader, Weight
from fp8jax.checkpoint._rules import WeightRules, quantize_params
from fp8jax.checkpoint._save import save
from fp8jax.checkpoint._stream import Outcome

__all__ = [
    "CheckpointError",
    "Difference",
    "Outcome",
    "Reader",
    "Weight",
    "WeightRules",
    "code_histogram",
    "dequantize_checkpoint",
    "diff",
    "load",
    "quantize_checkpoint",
    "quantize_params",
    "save",
    "stack_experts",
    "unstack_experts",
]
