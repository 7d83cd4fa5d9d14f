"""How fast is the FP8 GEMM? TFLOPS, and the ratio to cuBLASLt's blockwise kernel.

    python -m benchmarks.gemm [--only 1d2d] [--rounds 7]

Writes benchmarks/results/gemm.csv.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _harness
from fp8jax.kernels import mosaic_gpu
from fp8jax.testing import GEMM_SHAPES

CEILING = 1979  # TFLOPS of dense FP8, by the data sheet.

# (m, n, k); 1d2d is fprop and dgrad, 1d1d wgrad, whose k counts tokens.
SHAPES = {
    "1d2d": [
        *((shape.m, shape.n, shape.k) for shape in GEMM_SHAPES),
        (1, 7168, 2048),
        (64, 7168, 2048),
        (128, 7168, 2048),
        (128, 7168, 16384),
        (128, 24576, 1536),
    ],
    "1d1d": [
        (7168, 2048, 4096),
        (7168, 4096, 4096),
        (4096, 7168, 8192),
        (2048, 7168, 16384),
        (7168, 7168, 32768),
    ],
}
COLUMNS = (
    "fp8jax",
    "cublaslt_blockwise",
    "cublaslt_per_tensor_fast",
    "torch_bf16",
)


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
    print(f"ceiling {CEILING} TFLOPS; wrote {path}")


def _row(kind: str, m: int, n: int, k: int, *, rounds: int) -> dict[str, Any]:
    run, args, others = _contenders(kind, m, n, k)
    microseconds, clock = {"fp8jax": _harness.kernel_us(run, *args)}, "kernel"
    if microseconds["fp8jax"] >= _harness.SHORT_US:
        contenders = {"fp8jax": lambda: run(*args), **others}
        microseconds, clock = _harness.alternate(contenders, rounds=rounds), "wall"
    else:
        microseconds |= {k: _harness.torch_graph_us(f) for k, f in others.items()}
    tflops = {c: 2 * m * n * k / t * 1e-6 for c, t in microseconds.items()}
    base = tflops.get("cublaslt_blockwise")
    ratio = f"{tflops['fp8jax'] / base:.3f}" if base else ""
    cells = [f"{tflops[c]:.0f}" if c in tflops else "" for c in COLUMNS]
    print(f"{kind:6}{m:7}{n:7}{k:7}", *(f"{c:>25}" for c in cells), ratio, flush=True)
    shape = {"gemm": kind, "m": m, "n": n, "k": k, "clock": clock}
    return {**shape, **dict(zip(COLUMNS, cells, strict=True)), "ratio": ratio}


def _contenders(
    kind: str, m: int, n: int, k: int
) -> tuple[Any, tuple[jax.Array, ...], dict[str, Callable[[], Any]]]:
    """Our jitted GEMM with its arguments, and the others ready to launch."""
    rhs_rows = 128 if kind == "1d2d" else 1
    keys = jax.random.split(jax.random.key(m + n + k), 4)
    uniform = functools.partial(jax.random.uniform, minval=0.5, maxval=1.5)
    lhs, rhs = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in ((keys[0], (m, k)), (keys[1], (n, k)))
    )
    lhs8, rhs8 = (x.astype(jnp.float8_e4m3fn) for x in (lhs, rhs))
    # Scales lie as the kernels want them: [k / 128, m]; the transposes below cancel.
    lhs_scale = uniform(keys[2], (k // 128, m))
    rhs_scale = uniform(
        keys[3], (k // 128, n) if rhs_rows == 1 else (n // 128, k // 128)
    )

    @jax.jit
    def run(lhs8, lhs_scale, rhs8, rhs_scale):
        return mosaic_gpu.gemm(
            lhs8,
            lhs_scale.T,
            rhs8,
            rhs_scale.T if rhs_rows == 1 else rhs_scale,
            lhs_tile=(1, 128),
            rhs_tile=(rhs_rows, 128),
            out_dtype=jnp.bfloat16,
        )

    others = {}
    if _harness.HAS_TORCH:
        tensors = map(_harness.to_torch, (lhs, rhs, lhs8, rhs8, lhs_scale, rhs_scale))
        others = _torch_contenders(*tensors, per_row=rhs_rows == 1)
    return run, (lhs8, lhs_scale, rhs8, rhs_scale), others


def _torch_contenders(
    lhs, rhs, lhs8, rhs8, lhs_scale, rhs_scale, *, per_row: bool
) -> dict[str, Callable[[], Any]]:
    import torch  # pyright: ignore

    one = torch.ones((), device="cuda")
    product = functools.partial(
        torch._scaled_mm, lhs8, rhs8.t(), out_dtype=torch.bfloat16
    )
    contenders = {
        "cublaslt_blockwise": functools.partial(
            product,
            scale_a=lhs_scale.t(),
            scale_b=rhs_scale if per_row else rhs_scale.t(),
        ),
        "cublaslt_per_tensor_fast": functools.partial(
            product, scale_a=one, scale_b=one, use_fast_accum=True
        ),
        "torch_bf16": functools.partial(torch.mm, lhs, rhs.t()),
    }
    working = {}
    for name, contender in contenders.items():
        try:
            contender()
        except (RuntimeError, ValueError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
        else:
            working[name] = contender
    return working


if __name__ == "__main__":
    main()
