"""Timing for the benchmarks: contenders alternate in one process, medians are kept.

Absolute figures move with the card's clock and power limit, which a busy card reaches
within seconds. So contenders take turns, round after round, on the same random data,
and what is quoted is their ratio.
"""

import argparse
import csv
import datetime
import importlib.util
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fp8jax import tune

T = TypeVar("T")

RESULTS = pathlib.Path(__file__).parent / "results"
HAS_TORCH = importlib.util.find_spec("torch") is not None

# Below this a launch from Python may take longer than the kernel.
SHORT_US = 100.0
# A turn of a slow contender has fewer launches, so that it takes no longer than this.
TURN_US = 100_000.0
# Longer than the host takes to queue a turn's launches, at a millisecond each.
_AHEAD_LOOPS, _AHEAD_BYTES = 60, 1 << 30


def alternate(
    contenders: Mapping[str, Callable[[], Any]], *, launches: int = 20, rounds: int = 7
) -> dict[str, float]:
    """Median microseconds a launch of each contender, by wall clock, taking turns.

    Args:
        contenders: name to a function that launches once and returns its output, a JAX
            or a torch array; it may return before the device is done.
        launches: back-to-back launches in one round, at most: see `TURN_US`.
        rounds: how often every contender has its turn.
    """
    counts = {}
    for name, run in contenders.items():
        for _ in range(2):  # Compile, choose algorithms, fill caches.
            _wait(run())
        counts[name] = max(1, min(launches, int(TURN_US / _turn(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_turn(run, counts[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def alternate_queued(
    contenders: Mapping[str, Callable[[], Any]], *, launches: int = 24, rounds: int = 7
) -> dict[str, float]:
    """Median microseconds a launch keeps the device busy, taking turns.

    Gaps between its kernels count, and what the host takes to launch it does not: the
    device is kept busy until the host has queued a whole turn. Of two turns, one of a
    third of the launches, the difference is taken: what they have in common cancels.

    Args:
        contenders: as in `alternate`; JAX functions.
        launches: in the longer turn, at most: see `TURN_US`. JAX queues 32 at most.
        rounds: how often every contender has its turns.
    """
    busy = jax.jit(
        lambda x: jax.lax.fori_loop(0, _AHEAD_LOOPS, lambda _, x: x * 0.5 + 1, x)
    )
    x = jnp.ones(_AHEAD_BYTES // 4, jnp.float32)

    def turn(run: Callable[[], Any], count: int) -> float:
        return count * _turn(run, count, ahead=lambda: busy(x))

    counts = {}
    for name, run in contenders.items():
        _wait((busy(x), run()))  # Compile.
        most = max(3, min(launches, int(TURN_US / _turn(run, 1))))
        counts[name] = most, most // 3
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            most, few = counts[name]
            times[name].append((turn(run, most) - turn(run, few)) / (most - few))
    return {name: statistics.median(t) for name, t in times.items()}


def working(contenders: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Each one's output; one that does not run here is left out, and why is printed."""
    outputs = {}
    for name, run in contenders.items():
        try:
            outputs[name] = run()
            _wait(outputs[name])
        except Exception as error:  # Of whatever others raise: out of memory, no file.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"{name} is left out: {reason}", flush=True)
            outputs.pop(name, None)
    return outputs


def kernel_us(fn: Callable[..., Any], *args: Any, iterations: int = 20) -> float:
    """Median microseconds that a jitted JAX function's kernels take, by CUPTI."""
    return statistics.median(tune.kernel_times(fn, *args, iterations=iterations))


def alternate_clocks(
    clocks: Mapping[str, Callable[[], list[float]]], *, rounds: int = 5
) -> dict[str, float]:
    """Median microseconds by each contender's own clock, taking turns.

    Args:
        clocks: name to what `kernel_clock` or `graph_clock` gives.
        rounds: how often every contender has its turn.
    """
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            times[name] += clock()
    return {name: statistics.median(t) for name, t in times.items()}


def kernel_clock(
    fn: Callable[..., Any], *args: Any, iterations: int = 5
) -> Callable[[], list[float]]:
    """Times of a jitted JAX function's kernels, by CUPTI, without gaps between them."""
    return lambda: tune.kernel_times(fn, *args, iterations=iterations)


def alternate_kernels(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    turn_us: float = 8e3,
    rounds: int = 9,
) -> dict[str, float]:
    """Median microseconds that a launch's kernels take, by CUPTI, taking turns.

    One clock for JAX and torch, without launches and gaps, on a card as hot as a step
    has it: what it may draw is spread over everybody, as turns are shorter than it
    takes to change its frequency, and follow one another at once.

    Args:
        contenders: as in `alternate`.
        turn_us: how long a turn lasts, about.
        rounds: how often every contender has its turn.
    """
    counts = {}
    for name, run in contenders.items():
        _wait(run())
        counts[name] = max(3, round(turn_us / max(_kernel_turn(run, 3), 1.0)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            us = _kernel_turn(run, counts[name])
            if i > 0:  # The first round is for warmth.
                times[name].append(us)
    return {name: statistics.median(t) for name, t in times.items()}


def _kernel_turn(run: Callable[[], Any], launches: int) -> float:
    """Mean microseconds that a launch's kernels take, of any library, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    # JAX's own function for it takes JAX's functions alone.
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # pyright: ignore
    cupti._cupti_init()
    try:
        for _ in range(launches):
            out = run()
        _wait(out)
    finally:
        kernels = cupti._cupti_get_timings(False)
    if not kernels:
        raise RuntimeError("alternate_kernels: CUPTI saw no kernel.")
    return sum(float(milliseconds) for _, milliseconds in kernels) / launches * 1e3


def graph_clock(
    run: Callable[[], Any], *, launches: int = 20
) -> Callable[[], list[float]]:
    """Times of a torch function in a CUDA graph: its kernels and the gaps between."""
    import torch  # pyright: ignore

    def replay(graph: Any) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / launches * 1e3

    def clock() -> list[float]:
        # Captured anew each time: CUPTI, which came and went since, may have had a
        # hand in an older graph.
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                run()
        replay(graph)
        return [replay(graph) for _ in range(3)]

    return clock


def to_torch(x: jax.Array) -> Any:
    """The same memory as a torch tensor; FP8 by way of bytes."""
    import torch  # pyright: ignore

    if x.dtype.itemsize > 1:
        return torch.from_dlpack(x)
    octets = torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8))
    return octets.view(getattr(torch, str(x.dtype)))


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--commit", default=_commit(), help="of this code, where there is no git to ask"
    )
    return parser


def write_csv(name: str, rows: list[dict[str, Any]], commit: str) -> pathlib.Path:
    """Writes `results/<name>.csv`, every row with device, versions, commit and date."""
    where = _circumstances() | {"commit": commit}
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    return path


def _circumstances() -> dict[str, str]:
    versions = {"jax": jax.__version__, "torch": ""}
    if HAS_TORCH:
        import torch  # pyright: ignore

        versions["torch"] = torch.__version__
    return {
        "device": jax.devices()[0].device_kind,
        **versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = pathlib.Path(__file__).parent
    try:
        run = subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _turn(
    run: Callable[[], Any], launches: int, ahead: Callable[[], Any] = lambda: None
) -> float:
    """Microseconds a launch, by wall clock, what is launched `ahead` included."""
    start = time.perf_counter()
    ahead()
    for _ in range(launches):
        out = run()
    _wait(out)
    return (time.perf_counter() - start) / launches * 1e6


def _wait(out: Any) -> None:
    leaves = jax.tree.leaves(out)
    if any(hasattr(leaf, "is_cuda") for leaf in leaves):
        import torch  # pyright: ignore

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(leaves)
