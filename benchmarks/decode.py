"""How near to the memory's speed is a GEMM of few rows, as in decoding?

    python -m benchmarks.decode

1d2d, BF16 out. A GEMM of few rows reads its weight once and does little else: bytes of
the weight a second, beside what a copy (reads and writes) reaches on the same bytes.
Each launch reads another weight, enough of them that none is still in the L2 cache when
its turn comes again. Kernel time. Writes benchmarks/results/decode.csv.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _contenders, _harness
from benchmarks._peaks import memory_ceiling

SHAPES = [(7168, 16384), (7168, 2048), (4096, 7168), (24576, 1536)]  # n, k
TOKENS = [1, 16, 64, 128, 256]
COLD_BYTES = 200e6  # More than three times the L2 cache.
OTHER = "cublaslt_blockwise"


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    print(
        f"{'m':>5}{'n':>7}{'k':>7}{'us':>8}{'TFLOPS':>8}{'GB/s':>7}{'copy':>7}"
        f"{'of copy':>8}{'cuBLASLt us':>12}{'ratio':>7}"
    )
    for n, k in SHAPES:
        weights = round(COLD_BYTES / (n * k)) + 1
        copy_us = _copy_us(n * k, weights)
        for m in options.tokens:
            rows.append(_row(m, n, k, weights, copy_us, options.rounds))
    path = _harness.write_csv("decode", rows, options.commit)
    print(f"ceiling {memory_ceiling()}; wrote {path}")


def _row(
    m: int, n: int, k: int, weights: int, copy_us: float, rounds: int
) -> dict[str, Any]:
    batch = [_contenders.operands("1d2d", m, n, k, i) for i in range(weights)]
    gemm = _contenders.fp8_gemm("1d2d")
    run = jax.jit(lambda xs: [gemm(*x) for x in xs])
    clocks = {"fp8jax": _harness.kernel_clock(run, [x.quantized for x in batch])}
    # The first one tells whether it takes this m.
    if first := _contenders.torch_gemms("1d2d", batch[0], [OTHER]):
        others = [_contenders.torch_gemms("1d2d", x, [OTHER]) for x in batch[1:]]
        launch = functools.partial(_each, [x[OTHER] for x in (first, *others)])
        clocks[OTHER] = _harness.graph_clock(launch, launches=5)
    times = _harness.alternate_clocks(clocks, rounds=rounds)
    us = times["fp8jax"] / weights
    other_us = times[OTHER] / weights if OTHER in times else None
    rate, copy_rate = n * k / us * 1e-3, 2 * n * k / copy_us * 1e-3
    cells = {
        "us": f"{us:.2f}",
        "tflops": f"{2 * m * n * k / us * 1e-6:.1f}",
        "weight_gbps": f"{rate:.0f}",
        "copy_gbps": f"{copy_rate:.0f}",
        "of_copy": f"{rate / copy_rate:.3f}",
        "cublaslt_us": f"{other_us:.2f}" if other_us else "",
        "ratio": f"{other_us / us:.3f}" if other_us else "",
    }
    widths = (8, 8, 7, 7, 8, 12, 7)
    print(
        f"{m:5}{n:7}{k:7}",
        *(f"{c:>{w}}" for c, w in zip(cells.values(), widths, strict=True)),
        sep="",
        flush=True,
    )
    return {"m": m, "n": n, "k": k, **cells}


def _each(launches: list[Callable[[], Any]]) -> None:
    for launch in launches:
        launch()


def _copy_us(num_bytes: int, copies: int) -> float:
    """Microseconds to read `num_bytes` and write as many, from a cold cache."""
    # In float32: XLA's copies of narrower types are slower.
    arrays = [jnp.full((num_bytes // 4,), i, jnp.float32) for i in range(copies)]

    @jax.jit
    def add_one(xs: list[jax.Array]) -> list[jax.Array]:
        done = []
        for x in xs:  # One after the other: XLA would make one kernel of them.
            x, done = jax.lax.optimization_barrier((x, done))
            done = [*done, x + 1]
        return done

    return _harness.kernel_us(add_one, arrays, iterations=5) / copies


if __name__ == "__main__":
    main()
