"""How fast is the FP8 GEMM? TFLOPS, and the ratio to cuBLASLt's blockwise kernel.

    python -m benchmarks.gemm [--only 1d2d] [--rounds 7]

Writes benchmarks/results/gemm.csv.
"""

from typing import Any

from benchmarks import _contenders, _harness
from benchmarks._peaks import PEAK_TFLOPS
from fp8jax.testing import GEMM_SHAPES

# (m, n, k) of wgrad, whose k counts tokens.
_WGRAD = [
    (7168, 2048, 4096),
    (7168, 4096, 4096),
    (4096, 7168, 8192),
    (2048, 7168, 16384),
    (7168, 7168, 32768),
]
# By the kinds of `_contenders.TILES`.
SHAPES = {
    "1d2d": [
        *((shape.m, shape.n, shape.k) for shape in GEMM_SHAPES),
        (1, 7168, 2048),
        (64, 7168, 2048),
        (128, 7168, 2048),
        (128, 7168, 16384),
        (128, 24576, 1536),
    ],
    "1d1d": _WGRAD,
    "2d1d": _WGRAD,
}
OTHERS = ("cublaslt_blockwise", "cublaslt_per_tensor_fast", "torch_bf16")
COLUMNS = ("fp8jax", *OTHERS)


def main() -> None:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--only", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    print(f"{'':6}{'m':>7}{'n':>7}{'k':>7}", *(f"{c:>25}" for c in COLUMNS), "ratio")
    for kind, shapes in SHAPES.items():
        if options.only in (None, kind):
            rows += [_row(kind, *shape, rounds=options.rounds) for shape in shapes]
    path = _harness.write_csv("gemm", rows, options.commit)
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")


def _row(kind: str, m: int, n: int, k: int, *, rounds: int) -> dict[str, Any]:
    x = _contenders.operands(kind, m, n, k)
    run, others = _contenders.fp8_gemm(kind), _contenders.torch_gemms(kind, x, OTHERS)
    microseconds = _harness.kernel_us(run, *x.quantized)
    if microseconds >= _harness.SHORT_US:
        contenders = {"fp8jax": lambda: run(*x.quantized), **others}
        times, clock = _harness.alternate(contenders, rounds=rounds), "wall"
    else:
        clocks = {"fp8jax": _harness.kernel_clock(run, *x.quantized)}
        clocks |= {name: _harness.graph_clock(f) for name, f in others.items()}
        times, clock = _harness.alternate_clocks(clocks, rounds=rounds), "kernel"
    tflops = {c: 2 * m * n * k / t * 1e-6 for c, t in times.items()}
    base = tflops.get("cublaslt_blockwise")
    ratio = f"{tflops['fp8jax'] / base:.3f}" if base else ""
    cells = [f"{tflops[c]:.0f}" if c in tflops else "" for c in COLUMNS]
    print(f"{kind:6}{m:7}{n:7}{k:7}", *(f"{c:>25}" for c in cells), ratio, flush=True)
    shape = {"gemm": kind, "m": m, "n": n, "k": k, "clock": clock}
    return {**shape, **dict(zip(COLUMNS, cells, strict=True)), "ratio": ratio}


if __name__ == "__main__":
    main()
