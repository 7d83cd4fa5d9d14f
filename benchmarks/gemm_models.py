"""How fast is 1d2d against cuBLASLt's blockwise kernel on products of public models?

    python -m benchmarks.gemm_models [--only report] [--shapes 30] [--seconds 120]
    python -m benchmarks.gemm_models --only tune --candidates 8

The shapes (`_models.py`) are in two halves by a digest of their weight. What chooses
block shapes may look at the tuning half alone; the other half is what is reported. Of
each, `--shapes` are drawn by a fixed seed, and those that `--seconds` leave no time for
are left out, last ones first. `--candidates` times block shapes near the chosen one for
as many shapes of the tuning half, those with the least ratio. Writes
benchmarks/results/gemm_models.csv.
"""

import dataclasses
import functools
import itertools
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any

from benchmarks import _contenders, _harness
from benchmarks._models import HALVES, Shape, half, shapes
from benchmarks._peaks import PEAK_TFLOPS
from benchmarks._tables import mean
from fp8jax.kernels import mosaic_gpu
from fp8jax.kernels.mosaic_gpu import GemmConfig

OTHER = "cublaslt_blockwise"
KIND = "1d2d"
LAUNCHES = 12  # In one turn of a contender.
TOGETHER = 8  # Shapes that are compiled beside each other, then timed.
COLUMNS = ("half", "m", "n", "k", "fp8jax", OTHER, "ratio", "kernel_ratio", "clock")
WIDTHS = (7, 7, 7, 7, 8, 20, 7, 14, 8)


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--only", choices=HALVES)
    parser.add_argument("--shapes", type=int, default=30, help="of each half")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--candidates", type=int, default=0, metavar="SHAPES")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    drawn = sample(options.shapes, options.seed)
    drawn = [s for s in drawn if options.only in (None, half(s))]
    _print(COLUMNS)
    rows = []
    for i in range(0, len(drawn), TOGETHER):
        if time.monotonic() < end:
            rows += _rows(drawn[i : i + TOGETHER], options.rounds)
    for which in HALVES:
        _print_half([r for r in rows if r["half"] == which], which)
    path = _harness.write_csv("gemm_models", rows, options.commit)
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")
    worst = sorted((r for r in rows if r["half"] == "tune" and r["ratio"]), key=_ratio)
    for row in worst[: options.candidates]:
        _compare(Shape(*(row[side] for side in "mnk")), options.rounds)


def sample(count: int, seed: int) -> list[Shape]:
    """`count` shapes of each half, drawn by `seed`, the halves taking turns."""
    halves = [[s for s in shapes() if half(s) == which] for which in HALVES]
    rng = random.Random(seed)
    drawn = [rng.sample(h, min(count, len(h))) for h in halves]
    turns = itertools.zip_longest(*drawn)
    return [shape for turn in turns for shape in turn if shape is not None]


def variants(config: GemmConfig) -> list[GemmConfig]:
    """Block shapes near a chosen one that the kernel can run, that one first.

    Another order of the blocks, cluster, or width with the deepest pipeline that fits.
    """
    replaced = functools.partial(dataclasses.replace, config)
    found = [config]
    found += [replaced(snake_width=width) for width in (4, 16)]
    found += [replaced(snake_axis=1 - config.snake_axis)]
    found += [replaced(cluster=3 - config.cluster)]
    for block_n, together in ((64, 2), (96, 2), (160, 1), (192, 1)):
        chunks = min(together, config.chunks)
        shaped = functools.partial(
            replaced, block_n=block_n, chunks=chunks, accumulators=chunks
        )
        deep = [shaped(stages=stages) for stages in (6, 5, 4, 3, 2)]
        found += [c for c in deep if mosaic_gpu.refusal(KIND, c) is None][:1]
    return list(dict.fromkeys(found))


def _rows(some: Sequence[Shape], rounds: int) -> list[dict[str, Any]]:
    """A row for each shape that runs; the others are left out, and why is printed."""
    run = _contenders.fp8_gemm(KIND)

    def prepared(shape: Shape) -> _contenders.Operands:
        x = _contenders.operands(KIND, *shape)
        run(*x.quantized)
        return x

    rows = []
    with futures.ThreadPoolExecutor(len(some)) as pool:
        operands = [*pool.map(prepared, some)]
    for shape in some:
        x = operands.pop(0)
        measured = functools.partial(_row, shape, run, x, rounds)
        rows += _harness.working({str(tuple(shape)): measured}).values()
    return rows


def _row(shape: Shape, run: Any, x: _contenders.Operands, rounds: int) -> dict:
    ours = functools.partial(run, *x.quantized)
    others = _contenders.torch_gemms(KIND, x, [OTHER])
    clocks = {"fp8jax": _harness.kernel_clock(run, *x.quantized)}
    clocks |= {name: _harness.torch_kernel_clock(f) for name, f in others.items()}
    times = kernels = _harness.alternate_clocks(clocks, rounds=rounds)
    clock = "kernel"
    if kernels["fp8jax"] >= _harness.SHORT_US:
        contenders = {"fp8jax": ours, **others}
        times = _harness.alternate(contenders, launches=LAUNCHES, rounds=rounds)
        clock = "wall"
    tflops = {c: 2 * shape.m * shape.n * shape.k / t * 1e-6 for c, t in times.items()}
    row = {
        "half": half(shape),
        **shape._asdict(),
        "fp8jax": f"{tflops['fp8jax']:.0f}",
        OTHER: f"{tflops[OTHER]:.0f}" if OTHER in tflops else "",
        "ratio": _over(times),
        "kernel_ratio": _over(kernels),
        "clock": clock,
    }
    _print(row.values())
    return row


def _over(times: dict[str, float]) -> str:
    return f"{times[OTHER] / times['fp8jax']:.3f}" if OTHER in times else ""


def _print(cells: Iterable[Any]) -> None:
    print(*(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)), flush=True)


def _print_half(rows: list[dict[str, Any]], which: str) -> None:
    for column in ("ratio", "kernel_ratio"):
        ratios = [float(r[column]) for r in rows if r[column]]
        if ratios:
            least = min(ratios)
            below = sum(ratio < 1 for ratio in ratios)
            print(
                f"{which}, {len(ratios)} shapes, {column}: median "
                f"{statistics.median(ratios):.3f}, geometric mean {mean(ratios):.3f}, "
                f"least {least:.3f}, {below} below 1"
            )


def _ratio(row: dict[str, Any]) -> float:
    return float(row["ratio"])


def _compare(shape: Shape, rounds: int) -> None:
    """Prints the speed of block shapes near the chosen one, over cuBLASLt's."""
    x = _contenders.operands(KIND, *shape)
    sms = mosaic_gpu.num_sms()
    configs = variants(mosaic_gpu.choose_config(KIND, *shape, "bfloat16", sms))
    programs = {_brief(c): _contenders.fp8_gemm(KIND, config=c) for c in configs}
    runs = {name: functools.partial(p, *x.quantized) for name, p in programs.items()}
    with futures.ThreadPoolExecutor(TOGETHER) as pool:
        for run in runs.values():
            pool.submit(run)
    ours = [*_harness.working(runs)]
    runs = {name: runs[name] for name in ours}
    others = _contenders.torch_gemms(KIND, x, [OTHER])
    chosen = _brief(configs[0])
    if _harness.kernel_us(programs[chosen], *x.quantized) >= _harness.SHORT_US:
        times = _harness.alternate(runs | others, launches=LAUNCHES, rounds=rounds)
    else:
        clocks = {
            name: _harness.kernel_clock(programs[name], *x.quantized) for name in ours
        }
        clocks |= {name: _harness.torch_kernel_clock(f) for name, f in others.items()}
        times = _harness.alternate_clocks(clocks, rounds=rounds)
    base = times[chosen]
    best = min(ours, key=lambda name: times[name])
    gain = f"{base / times[best]:.3f}"
    print(f"\n{tuple(shape)}: chosen {chosen}, best {best}, gain {gain}")
    for name, us in sorted(times.items(), key=lambda item: item[1]):
        over = times[OTHER] / us if OTHER in times else 0
        print(f"  {us:9.1f} us {base / us:7.3f} {over:7.3f}  {name}", flush=True)


def _brief(config: GemmConfig) -> str:
    return (
        f"{config.block_m}x{config.block_n} {config.split} chunks {config.chunks} acc "
        f"{config.accumulators} stages {config.stages} cluster {config.cluster} snake "
        f"{config.snake_axis}, {config.snake_width}"
    )


if __name__ == "__main__":
    main()
