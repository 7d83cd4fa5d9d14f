"""How fast is 1d2d against cuBLASLt's blockwise kernel on products of public models?

    python -m benchmarks.gemm_models [--only report] [--shapes 30] [--seconds 120]
    python -m benchmarks.gemm_models --candidates [--shapes 10] [--seed 1]

The shapes (`_models.py`) are in two halves by a digest of their weight. What chooses
block shapes may look at the tuning half alone; the other half is what is reported. Of
each, `--shapes` are drawn by a fixed seed, and those that `--seconds` leave no time for
are left out, last ones first. Writes benchmarks/results/gemm_models.csv.

`--candidates` times every order of the blocks, with and without a cluster, for shapes
of the tuning half, and prints each one's speed over the chosen one's and over
cuBLASLt's. Writes benchmarks/results/gemm_candidates.csv.
"""

import dataclasses
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
TOGETHER = 8  # Programs that are compiled beside each other, then timed.
COLUMNS = ("half", "m", "n", "k", "fp8jax", OTHER, "ratio")
WIDTHS = (7, 7, 7, 7, 8, 20, 7)


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--only", choices=HALVES)
    parser.add_argument("--shapes", type=int, default=30, help="of each half")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, about")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--candidates", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    only = "tune" if options.candidates else options.only
    drawn = sample(options.shapes, options.seed)
    drawn = [shape for shape in drawn if only in (None, half(shape))]
    if options.candidates:
        rows = []
        for shape in drawn:
            if time.monotonic() < end:
                rows += _compared(shape, options.rounds)
        print(f"wrote {_harness.write_csv('gemm_candidates', rows, options.commit)}")
        return
    _print(COLUMNS)
    rows = []
    for i in range(0, len(drawn), TOGETHER):
        if time.monotonic() < end:
            rows += _rows(drawn[i : i + TOGETHER], options.rounds)
    for which in HALVES:
        _print_half([r for r in rows if r["half"] == which], which)
    path = _harness.write_csv("gemm_models", rows, options.commit)
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")


def sample(count: int, seed: int) -> list[Shape]:
    """`count` shapes of each half, drawn by `seed`, the halves taking turns."""
    halves = [[s for s in shapes() if half(s) == which] for which in HALVES]
    rng = random.Random(seed)
    drawn = [rng.sample(h, min(count, len(h))) for h in halves]
    turns = itertools.zip_longest(*drawn)
    return [shape for turn in turns for shape in turn if shape is not None]


def orders(config: GemmConfig) -> list[GemmConfig]:
    """Every order of the blocks, with and without a cluster; the given one first."""
    found = [
        dataclasses.replace(config, cluster=c, snake_axis=axis, snake_width=width)
        for c, axis, width in itertools.product((1, 2), (0, 1), (8, 16))
    ]
    return list(dict.fromkeys((config, *found)))


def _rows(some: Sequence[Shape], rounds: int) -> list[dict[str, Any]]:
    """A row for each shape that runs; the others are left out, and why is printed."""
    run = _contenders.fp8_gemm(KIND)
    operands = [_contenders.operands(KIND, *shape) for shape in some]
    launches = [functools.partial(run, *x.quantized) for x in operands]
    _compile(launches)
    rows = []
    for shape, x, launch in zip(some, operands, launches, strict=True):
        measured = functools.partial(_row, shape, launch, x, rounds)
        rows += _harness.working({str(tuple(shape)): measured}).values()
    return rows


def _compile(launches: Iterable[Callable[[], Any]]) -> None:
    """Compiles beside each other; what does not compile raises where it is used."""
    with futures.ThreadPoolExecutor(TOGETHER) as pool:
        futures.wait([pool.submit(launch) for launch in launches])


def _row(
    shape: Shape, launch: Callable[[], Any], x: _contenders.Operands, rounds: int
) -> dict[str, Any]:
    contenders = {"fp8jax": launch, **_contenders.torch_gemms(KIND, x, [OTHER])}
    times = _harness.alternate_kernels(contenders, rounds=rounds)
    tflops = {c: 2 * shape.m * shape.n * shape.k / t * 1e-6 for c, t in times.items()}
    row = {
        "half": half(shape),
        **shape._asdict(),
        "fp8jax": f"{tflops['fp8jax']:.0f}",
        OTHER: f"{tflops[OTHER]:.0f}" if OTHER in tflops else "",
        "ratio": _over(times, "fp8jax"),
    }
    _print(row.values())
    return row


def _over(times: dict[str, float], name: str) -> str:
    return f"{times[OTHER] / times[name]:.3f}" if OTHER in times else ""


def _print(cells: Iterable[Any]) -> None:
    print(*(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)), flush=True)


def _print_half(rows: list[dict[str, Any]], which: str) -> None:
    ratios = [float(r["ratio"]) for r in rows if r["ratio"]]
    if ratios:
        print(
            f"{which}, {len(ratios)} shapes: median {statistics.median(ratios):.3f}, "
            f"geometric mean {mean(ratios):.3f}, least {min(ratios):.3f}, "
            f"{sum(ratio < 1 for ratio in ratios)} below 1"
        )


def _compared(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """A row for each order of the blocks, and prints them, the fastest first."""
    x = _contenders.operands(KIND, *shape)
    sms = mosaic_gpu.num_sms()
    configs = orders(mosaic_gpu.choose_config(KIND, *shape, "bfloat16", sms))
    launches = {
        _brief(c): functools.partial(_contenders.fp8_gemm(KIND, config=c), *x.quantized)
        for c in configs
    }
    _compile(launches.values())
    launches = {name: launches[name] for name in _harness.working(launches)}
    others = _contenders.torch_gemms(KIND, x, [OTHER])
    times = _harness.alternate_kernels(launches | others, rounds=rounds)
    chosen = _brief(configs[0])
    print(f"{tuple(shape)}: us, over the chosen one's speed, over cuBLASLt's")
    for name in sorted(times, key=times.__getitem__):
        mark = " (chosen)" if name == chosen else ""
        gain = times[chosen] / times[name]
        print(f"  {times[name]:9.1f}{gain:7.3f} {_over(times, name):>6} {name}{mark}")
    return [
        {
            **shape._asdict(),
            "cluster": c.cluster,
            "snake_axis": c.snake_axis,
            "snake_width": c.snake_width,
            "us": f"{times[_brief(c)]:.2f}",
            "ratio": _over(times, _brief(c)),
            "chosen": int(c == configs[0]),
        }
        for c in configs
        if _brief(c) in times
    ]


def _brief(config: GemmConfig) -> str:
    side = "mn"[config.snake_axis]
    return f"cluster {config.cluster}, {config.snake_width} along {side}"


if __name__ == "__main__":
    main()
