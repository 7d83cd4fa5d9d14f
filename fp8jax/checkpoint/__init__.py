"""Checkpoints in DeepSeek-V3's format: FP8 weights with a scale for each tile."""

from fp8jax.checkpoint._error import CheckpointError
from fp8jax.checkpoint._load import load
from fp8jax.checkpoint._reader import Reader, Weight
from fp8jax.checkpoint._save import save

__all__ = ["CheckpointError", "Reader", "Weight", "load", "save"]
