"""How fast is quantization? GB/s of reads and writes, beside XLA's fusions and a copy.

    python -m benchmarks.quantize

Every input byte is counted once, and so is every byte of codes. Kernel time by CUPTI.
Writes benchmarks/results/quantize.csv.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _harness
from benchmarks._peaks import memory_ceiling
from fp8jax.kernels import mosaic_gpu, xla

SHAPES = [(16384, 7168), (4096, 7168), (4096, 2048), (7168, 18432)]
COLUMNS = ("fp8jax", "xla", "copy")
ROW, BOX = (1, 128), (128, 128)


@dataclasses.dataclass(frozen=True)
class Op:
    """One kernel op as it is measured.

    Attributes:
        what: its name in the table.
        kernel: its name among the kernels.
        static: its arguments besides dtype, scale and eps.
        inputs: matrices [m, k] that it reads.
        outputs: arrays of codes that it writes.
    """

    what: str
    kernel: str
    static: dict[str, Any]
    inputs: int = 1
    outputs: int = 1


_ALONG, _BOTH = {"tile": ROW, "tile_t": None}, {"tile": ROW, "tile_t": ROW}
OPS = [
    Op("1x128", "quantize", {"tile": ROW}),
    Op("128x1", "quantize", {"tile": ROW, "transposed": True}),
    Op("128x128", "quantize", {"tile": BOX}),
    Op("1x128, both ways", "quantize_both", _BOTH, outputs=2),
    Op(
        "128x128 and transposed",
        "quantize_both",
        {"tile": BOX, "tile_t": BOX},
        outputs=2,
    ),
    Op("swiglu, 1x128", "quantize_swiglu", _ALONG, inputs=2),
    Op("swiglu, both ways", "quantize_swiglu", _BOTH, inputs=2, outputs=2),
    Op(
        "swiglu's gradient, both ways",
        "quantize_swiglu_gradient",
        _BOTH,
        inputs=3,
        outputs=4,
    ),
    Op("rms_norm, 1x128", "quantize_rms_norm", {"tile": ROW, "epsilon": 1e-6}),
]


def main() -> None:
    options = _harness.options_parser(__doc__).parse_args()
    rows = []
    print(f"{'what':>30}{'m':>7}{'k':>7}{'dtype':>10}", *(f"{c:>8}" for c in COLUMNS))
    for m, k in SHAPES:
        for dtype in (jnp.bfloat16, jnp.float32):
            rows += _rows(m, k, dtype)
    path = _harness.write_csv("quantize", rows, options.commit)
    print(f"ceiling {memory_ceiling()}; wrote {path}")


def _rows(m: int, k: int, dtype) -> Iterable[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(m + k), 3)
    arrays = [jax.random.normal(key, (m, k), dtype) for key in keys]
    x = arrays[0]
    copied = _rate(lambda x: x + jnp.ones((), x.dtype), (x,), 2 * x.nbytes)
    for op in OPS:
        inputs = tuple(arrays[: op.inputs])
        moved = op.inputs * x.nbytes + op.outputs * x.size
        if op.kernel == "quantize_rms_norm":
            inputs = (x, x[0])  # The weight is a row.
        try:
            ours = _rate(functools.partial(_run, op, mosaic_gpu), inputs, moved)
        except NotImplementedError as reason:
            print(f"left out: {reason}")
            continue
        rates = {
            "fp8jax": ours,
            "xla": _rate(functools.partial(_run, op, xla), inputs, moved),
            "copy": copied,
        }
        cells = [f"{rates[c]:.0f}" for c in COLUMNS]
        name = jnp.dtype(dtype).name
        print(
            f"{op.what:>30}{m:7}{k:7}{name:>10}",
            *(f"{c:>8}" for c in cells),
            flush=True,
        )
        shape = {"what": op.what, "m": m, "k": k, "dtype": name}
        yield {**shape, **dict(zip(COLUMNS, cells, strict=True))}


def _run(op: Op, kernels: Any, *inputs: jax.Array) -> Any:
    how = {"dtype": jnp.float8_e4m3fn, "scale": "pow2", "eps": 0.0}
    return jax.tree.map(
        # As the GEMMs take scales along rows: [k / 128, m].
        lambda a: a.T if a.dtype == jnp.float32 else a,
        getattr(kernels, op.kernel)(*inputs, **op.static, **how),
    )


def _rate(fn, arrays: tuple[jax.Array, ...], moved: int) -> float:
    """GB/s, where a call moves `moved` bytes."""
    return moved / _harness.kernel_us(jax.jit(fn), *arrays) * 1e-3


if __name__ == "__main__":
    main()
