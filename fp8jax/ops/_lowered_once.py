"""One device's part of a product, lowered once for equal shards.

XLA's partitioner asks for each product of a program by itself, and JAX lowers each
answer anew: its GPU kernels take a third of a second each, and most are equal. An
exported function is lowered once, and then only read.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import export

from fp8jax.matmul import has_gpu_kernels

# Pallas promises no stability of its calls between versions; these live in one process.
_CHECKS = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]


def lowered_once(product: Callable[..., Any]) -> Callable[..., Any]:
    """`product`, a function of arrays, lowered once where that is costly."""

    def run(*args: jax.Array) -> Any:
        if not has_gpu_kernels():
            return product(*args)
        avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
        x64 = jax.config.read("jax_enable_x64")
        return _exported(product, avals, x64).call(*args)

    return run


@functools.lru_cache(maxsize=1024)
def _exported(product: Callable[..., Any], avals: Any, x64: bool) -> export.Exported:
    del x64  # A part of the key alone: what is traced depends on it.
    run = jax.jit(lambda *args: product(*args))
    return export.export(run, platforms=["cuda"], disabled_checks=_CHECKS)(*avals)
