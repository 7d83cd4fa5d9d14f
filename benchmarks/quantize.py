"""How fast is quantization? GB/s of reads and writes, beside XLA's fusions and a copy.

    python -m benchmarks.quantize

Every input byte is counted once, and so is every byte of codes. Kernel time by CUPTI.
Writes benchmarks/results/quantize.csv.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _harness
from fp8jax.kernels import mosaic_gpu, xla

CEILING = 4800  # GB/s of an H200's memory, by the data sheet.
SHAPES = [(16384, 7168), (4096, 7168), (4096, 2048), (7168, 18432)]
TILES = [(1, 128), (128, 1), (128, 128)]
COLUMNS = ("fp8jax", "xla", "copy")


def main() -> None:
    options = _harness.options_parser(__doc__).parse_args()
    rows = []
    print(f"{'tile':>12}{'m':>7}{'k':>7}{'dtype':>10}", *(f"{c:>8}" for c in COLUMNS))
    for m, k in SHAPES:
        for dtype in (jnp.bfloat16, jnp.float32):
            rows += [_row(tile, m, k, dtype) for tile in TILES]
    path = _harness.write_csv("quantize", rows, options.commit)
    print(f"ceiling {CEILING} GB/s; wrote {path}")


def _row(tile: tuple[int, int], m: int, k: int, dtype) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(m + k), (m, k), dtype)

    def run(x: jax.Array, quantize) -> tuple[jax.Array, jax.Array]:
        data, scale = quantize(
            x, tile=tile, dtype=jnp.float8_e4m3fn, scale="pow2", eps=0.0
        )
        # As the GEMMs take them: K-major codes, and scales along rows as [k / 128, m].
        data = data.T if tile[1] == 1 else data
        return data, scale.T if tile[0] == 1 else scale

    moved = x.nbytes + x.size
    rates = {
        "fp8jax": _rate(functools.partial(run, quantize=mosaic_gpu.quantize), x, moved),
        "xla": _rate(functools.partial(run, quantize=xla.quantize), x, moved),
        "copy": _rate(lambda x: x + jnp.ones((), x.dtype), x, 2 * x.nbytes),
    }
    name = f"{tile[0]}x{tile[1]}"
    cells = [f"{rates[c]:.0f}" for c in COLUMNS]
    print(
        f"{name:>12}{m:7}{k:7}{jnp.dtype(dtype).name:>10}",
        *(f"{c:>8}" for c in cells),
        flush=True,
    )
    shape = {"tile": name, "m": m, "k": k, "dtype": jnp.dtype(dtype).name}
    return {**shape, **dict(zip(COLUMNS, cells, strict=True))}


def _rate(fn, x: jax.Array, moved: int) -> float:
    """GB/s, where a call moves `moved` bytes."""
    return moved / _harness.kernel_us(jax.jit(fn), x) * 1e-3


if __name__ == "__main__":
    main()
