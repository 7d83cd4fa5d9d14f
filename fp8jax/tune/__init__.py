"""Why a GEMM runs as it does, and how to measure something better.

`python -m fp8jax.tune --help`; docs/tuning.md says when it is worth it.
"""

from fp8jax.kernels.mosaic_gpu import load_tuning
from fp8jax.tune._against import Against, against_bf16
from fp8jax.tune._clock import kernel_times
from fp8jax.tune._explain import Explanation, explain

__all__ = [
    "Against",
    "Explanation",
    "against_bf16",
    "explain",
    "kernel_times",
    "load_tuning",
]
