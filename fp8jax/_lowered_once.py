"""GPU kernels that are lowered once for many programs.

XLA's partitioner asks for each product of a program by itself, and JAX lowers each
answer as a program of its own: a GPU kernel takes a third of a second, and most are
equal. An exported function is lowered once, and then only read.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import export

# Pallas promises no stability of its calls between versions; these live in one process.
_CHECKS = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
_IS_ON = contextvars.ContextVar("fp8jax_lowered_once", default=False)


@contextlib.contextmanager
def kernels_lowered_once() -> Iterator[None]:
    """Where it is entered, kernels are traced as calls of what is lowered already."""
    token = _IS_ON.set(True)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def is_asked() -> bool:
    """Whether that is entered here."""
    return _IS_ON.get()


def called(kernel: Callable[..., Any], *arrays: jax.Array, **static: Any) -> Any:
    """`kernel(*arrays, **static)`, lowered once.

    Args:
        kernel: the same function object for the same kernel.
        arrays: its operands.
        static: hashable.
    """
    run = functools.partial(kernel, **static)
    options = tuple(sorted(static.items()))

    @jax.custom_batching.custom_vmap
    def once(*arrays: jax.Array) -> Any:
        avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        x64 = jax.config.read("jax_enable_x64")
        return _exported(kernel, options, avals, x64).call(*arrays)

    @once.def_vmap
    def _vmap(axis_size: int, is_mapped: Any, *arrays: jax.Array) -> Any:
        del axis_size  # What is exported has no rule: kernels have their own.
        out = jax.vmap(run, [0 if mapped else None for mapped in is_mapped])(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return once(*arrays)


@functools.lru_cache(maxsize=1024)
def _exported(
    kernel: Callable[..., Any], static: tuple, avals: Any, x64: bool
) -> export.Exported:
    del x64  # A part of the key alone: what is traced depends on it.
    run = jax.jit(functools.partial(kernel, **dict(static)))
    return export.export(run, platforms=["cuda"], disabled_checks=_CHECKS)(*avals)
