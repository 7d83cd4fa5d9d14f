"""The command `fp8jax`."""

from fp8jax.cli._main import main

__all__ = ["main"]
