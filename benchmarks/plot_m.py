"""How does the cost grow with the number of tokens? TFLOPS for m from 1 to 65536.

    python -m benchmarks.plot_m [--plot-only]

1d2d, BF16 out, kernel time. Writes benchmarks/results/gemm_by_m.csv and .png;
--plot-only draws the PNG anew from the CSV and needs no GPU.
"""

import csv
import pathlib
from typing import Any

from benchmarks import _contenders, _harness
from benchmarks._peaks import PEAK_TFLOPS

MEMORY = 4300  # GB/s that a large copy reaches.
SHAPES = [(7168, 2048), (4096, 7168)]  # n, k
TOKENS = [1, 4, 16, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096, 16384, 65536]
OTHERS = ("cublaslt_blockwise", "torch_bf16")
LABELS = {
    "fp8jax": "fp8jax",
    "cublaslt_blockwise": "cuBLASLt blockwise FP8",
    "torch_bf16": "BF16 (torch)",
}
NAME = "gemm_by_m"


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    if not options.plot_only:
        print(f"{'m':>7}{'n':>7}{'k':>7}", *(f"{c:>20}" for c in LABELS))
        rows = [_row(m, n, k) for n, k in SHAPES for m in options.tokens]
        print(f"wrote {_harness.write_csv(NAME, rows, options.commit)}")
    path = _harness.RESULTS / f"{NAME}.csv"
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        parser.error(f"--plot-only draws {path}, which is not there: measure first.")
    print(f"wrote {plot(rows, path.with_suffix('.png'))}")


def _row(m: int, n: int, k: int) -> dict[str, Any]:
    x = _contenders.operands("1d2d", m, n, k)
    run = _contenders.fp8_gemm("1d2d")
    clocks = {"fp8jax": _harness.kernel_clock(run, *x.quantized)}
    clocks |= {
        name: _harness.graph_clock(launch, launches=5)
        for name, launch in _contenders.torch_gemms("1d2d", x, OTHERS).items()
    }
    times = _harness.alternate_clocks(clocks, rounds=3)
    tflops = {
        c: f"{2 * m * n * k / times[c] * 1e-6:.1f}" if c in times else ""
        for c in LABELS
    }
    print(f"{m:7}{n:7}{k:7}", *(f"{t:>20}" for t in tflops.values()), flush=True)
    return {"m": m, "n": n, "k": k, **tflops}


def plot(rows: list[dict[str, str]], path: pathlib.Path) -> pathlib.Path:
    """Draws TFLOPS against m, a panel for each (n, k), with the two ceilings.

    Args:
        rows: of the CSV.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys((int(r["n"]), int(r["k"])) for r in rows))
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.5 * len(shapes), 4), sharey=True, squeeze=False
    )
    for (n, k), axis in zip(shapes, axes[0], strict=True):
        of_shape = [r for r in rows if (int(r["n"]), int(r["k"])) == (n, k)]
        for column, label in LABELS.items():
            points = [(int(r["m"]), float(r[column])) for r in of_shape if r[column]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
        ms = [int(r["m"]) for r in of_shape]
        axis.plot(ms, [_ceiling(m, n, k) for m in ms], "k--", lw=1, label="ceiling")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="m (tokens)",
            title=f"n = {n}, k = {k}",
        )
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOPS")
    axes[0][0].legend()
    figure.suptitle(f"FP8 GEMM, 1x128 by 128x128, {rows[0]['device']}")
    figure.tight_layout()
    # No date or version in the file: the same CSV gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def _ceiling(m: int, n: int, k: int) -> float:
    """TFLOPS that the tensor cores and the memory allow: FP8 in, BF16 out."""
    moved = (m + n) * k + 2 * m * n
    return min(PEAK_TFLOPS, 2 * m * n * k / (moved / MEMORY * 1e-3) * 1e-6)


if __name__ == "__main__":
    main()
