"""Kernel time, by CUPTI: what a GPU works, without launches and gaps."""

from collections.abc import Callable
from typing import Any


def kernel_times(
    fn: Callable[..., Any], *args: Any, iterations: int = 20
) -> list[float]:
    """Microseconds that all kernels of one call take, for each of `iterations` calls.

    Args:
        fn: a jitted function, or what `.lower(...).compile()` returned; it is called
            once more to begin with.
        args: its arguments.
        iterations: at least 2.

    Raises:
        ValueError: For fewer iterations.
        RuntimeError: If CUPTI saw no kernel, as in a process that has no GPU.
    """
    from jax.experimental.mosaic.gpu import profiler

    if iterations < 2:
        raise ValueError(f"kernel_times takes iterations >= 2, got {iterations}.")
    _, milliseconds = profiler.measure(fn, iterations=iterations)(*args)
    if not isinstance(milliseconds, list):
        raise RuntimeError("kernel_times: CUPTI saw no kernel.")
    return [float(t) * 1e3 for t in milliseconds]  # pyright: ignore
