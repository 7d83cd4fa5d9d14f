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
    calls = kernels_of(fn, *args, iterations=iterations)
    return [sum(us for _, us in call) for call in calls]


def kernels_of(
    fn: Callable[..., Any], *args: Any, iterations: int
) -> list[list[tuple[str, float]]]:
    """As `kernel_times`, but for each call all kernels, with their names."""
    from jax.experimental.mosaic.gpu import profiler

    if iterations < 2:
        raise ValueError(f"kernel_times takes iterations >= 2, got {iterations}.")
    run = profiler.measure(fn, aggregate=False, iterations=iterations)
    _, calls = run(*args)
    if not calls:
        raise RuntimeError("kernel_times: CUPTI saw no kernel.")
    return [[(name, float(ms) * 1e3) for name, ms in call] for call in calls]
