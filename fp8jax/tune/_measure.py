"""Candidate configs of one GEMM, timed against each other on the GPU present."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.kernels.mosaic_gpu import (
    CHUNK,
    Entry,
    GemmConfig,
    GemmProblem,
    multiply,
)
from fp8jax.tune._clock import kernel_times

_ITERATIONS = 5  # Calls in one turn.
# The computed config stays unless another is faster by more than repeats differ.
_WORTH_IT = 0.99


@dataclasses.dataclass(frozen=True)
class Timing:
    """One candidate.

    Attributes:
        config: what ran.
        us: median kernel time in microseconds; None if it did not run.
        compile_s: seconds to trace, lower and compile.
        note: why it did not run.
    """

    config: GemmConfig
    us: float | None
    compile_s: float
    note: str = ""


def measure(
    problem: GemmProblem, configs: Sequence[GemmConfig], *, rounds: int = 5
) -> list[Timing]:
    """Times `configs`, the computed one first, taking turns on the same random data.

    A candidate that does not compile, does not run or gives other bits than the first
    is left out with a note.

    Args:
        problem: what to multiply.
        configs: what to try.
        rounds: turns of each, of five calls.
    """
    operands = _operands(problem)
    programs, timings = {}, {}
    expected = None
    for config in configs:
        start = time.perf_counter()
        # Any error: whatever a compiler thinks of a candidate, the others can run.
        try:
            program = _jitted(problem, config).lower(*operands).compile()
            seconds = time.perf_counter() - start
            out = jax.block_until_ready(program(*operands))
        except Exception as error:
            seconds = time.perf_counter() - start
            timings[config] = Timing(config, None, seconds, _first_line(error))
            continue
        expected = out if expected is None else expected
        if not bool((out == expected).all()):
            timings[config] = Timing(config, None, seconds, "gives other bits")
            continue
        programs[config] = program
        timings[config] = Timing(config, None, seconds)
    times: dict[GemmConfig, list[float]] = {config: [] for config in programs}
    for _ in range(rounds):
        for config, program in programs.items():
            times[config] += kernel_times(program, *operands, iterations=_ITERATIONS)
    for config, microseconds in times.items():
        median = statistics.median(microseconds)
        timings[config] = dataclasses.replace(timings[config], us=median)
    return [timings[config] for config in configs]


def best(problem: GemmProblem, timings: Sequence[Timing]) -> Entry | None:
    """The entry for a table; None if the computed config, the first, did not run."""
    computed = timings[0]
    if computed.us is None:
        return None
    fastest = min((t for t in timings if t.us is not None), key=lambda t: t.us or 0)
    assert fastest.us is not None
    if fastest.us > _WORTH_IT * computed.us:
        fastest = computed
    return Entry(problem, fastest.config, fastest.us or computed.us, computed.us)


def _jitted(problem: GemmProblem, config: GemmConfig) -> Any:
    tile = (1 if problem.kind == "1d1d" else CHUNK, CHUNK)

    @jax.jit
    def run(lhs, lhs_scale, rhs, rhs_scale):
        # The kernel reads scales along rows as [k / 128, m]: the transposes cancel.
        return multiply(
            lhs,
            lhs_scale.T,
            rhs,
            rhs_scale.T if tile[0] == 1 else rhs_scale,
            rhs_tile=tile,
            out_dtype=problem.out_dtype,
            config=config,
        )

    return run


def _operands(problem: GemmProblem) -> tuple[jax.Array, ...]:
    """Random codes of every exponent, and scales as the kernel reads them."""
    m, n, k, chunks = problem.m, problem.n, problem.k, -(-problem.k // CHUNK)
    keys = jax.random.split(jax.random.key(0), 4)
    uniform = functools.partial(jax.random.uniform, minval=0.5, maxval=1.5)
    lhs, rhs = (
        jax.random.normal(key, (side, k), jnp.bfloat16).astype(jnp.float8_e4m3fn)
        for key, side in ((keys[0], m), (keys[1], n))
    )
    shape = (chunks, n) if problem.kind == "1d1d" else (-(-n // CHUNK), chunks)
    return lhs, uniform(keys[2], (chunks, m)), rhs, uniform(keys[3], shape)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100]
