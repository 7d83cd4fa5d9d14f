"""How fast are the grouped GEMMs? TFLOPS beside the dense kernel's and BF16's.

    python -m benchmarks.grouped [--only 1d2d] [--rounds 7] [--without lax_bf16]

1d2d is fprop, rows in groups, to bfloat16; 1d1d and 2d1d are wgrad, the contraction in
groups, to float32. The dense kernel makes one product of as many FLOPs, and dense_bf16
is the same one in BF16 by cuBLAS. Writes benchmarks/results/grouped.csv.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fp8jax
from benchmarks import _contenders, _harness, _ragged
from benchmarks._peaks import PEAK_TFLOPS
from fp8jax import matmul, numerics

IMPLEMENTATION = "mosaic_gpu"  # Not to be measured by mistake: XLA's.

# With a group of none and rows that fill no block.
_UNEVEN = (9001, 0, 7777, 5003, 129, 4500, 6229, 129)
_WGRAD = [((8192,) * 4, 4096, 7168), ((4096,) * 8, 7168, 2048)]
# (group sizes, n, k) of fprop, (group sizes, m, n) of wgrad: there in whole chunks.
SHAPES = {
    "1d2d": [
        ((8192,) * 4, 4096, 7168),
        ((8192,) * 4, 7168, 2048),
        ((4096,) * 8, 4096, 7168),
        ((4096,) * 8, 7168, 2048),
        ((192,) * 32, 6144, 7168),
        (_UNEVEN, 4096, 7168),
    ],
    "1d1d": _WGRAD,
    "2d1d": _WGRAD,
}
OTHERS = ("lax_bf16", "pallas_bf16", "dense_bf16")
COLUMNS = ("fp8jax", "dense", *OTHERS)


class Contender(NamedTuple):
    """A jitted function and what it is timed on."""

    fn: Callable[..., jax.Array]
    args: tuple[jax.Array, ...]

    def launch(self) -> jax.Array:
        return self.fn(*self.args)


def main() -> None:
    options = _options()
    rows = []
    print(
        f"{'':6}{'groups':>7}{'m':>7}{'n':>7}{'k':>7}", *(f"{c:>12}" for c in COLUMNS)
    )
    path = None
    for kind, shapes in SHAPES.items():
        for shape in shapes if options.only in (None, kind) else ():
            rows.append(_row(kind, shape, options))
            # Each time: a run that is stopped loses no row.
            path = _harness.write_csv("grouped", rows, options.commit)
    print(f"ceiling {PEAK_TFLOPS} TFLOPS; wrote {path}")


def _options() -> argparse.Namespace:
    parser = _harness.options_parser(__doc__)
    parser.add_argument("--only", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--without", nargs="+", choices=OTHERS, default=[], help="not to be timed"
    )
    return parser.parse_args()


def _row(
    kind: str, shape: tuple[tuple[int, ...], int, int], options: argparse.Namespace
) -> dict[str, Any]:
    sizes, one, other = shape
    rows = sum(sizes)
    m, n, k = (rows, one, other) if kind == "1d2d" else (one, other, rows)
    make = _fprop if kind == "1d2d" else _wgrad
    ours, others, pallas = make(kind, sizes, m, n, k)
    others = {c: v for c, v in others.items() if c not in options.without}
    outputs = _harness.working({c: v.launch for c, v in others.items()})
    contenders = ours | {c: others[c] for c in outputs}
    blocks = None
    if "pallas_bf16" not in options.without:
        blocks = _fastest(pallas, outputs.get("lax_bf16"))
    if blocks is not None:
        contenders["pallas_bf16"] = pallas[blocks]
    del outputs
    times, clock = _times(contenders, options.rounds)
    # A few launches at a time: the card's clock has not come down yet.
    kernels = _harness.alternate_clocks(
        {c: _harness.kernel_clock(v.fn, *v.args) for c, v in ours.items()}, rounds=3
    )
    tflops, alone = (
        {c: 2 * m * n * k / us * 1e-6 for c, us in found.items()}
        for found in (times, kernels)
    )
    bf16 = [tflops[c] for c in OTHERS[:2] if c in tflops]
    cells = [f"{tflops[c]:.0f}" if c in tflops else "" for c in COLUMNS]
    of_dense = f"{tflops['fp8jax'] / tflops['dense']:.3f}"
    over_bf16 = f"{tflops['fp8jax'] / max(bf16):.3f}" if bf16 else ""
    print(
        f"{kind:6}{len(sizes):7}{m:7}{n:7}{k:7}",
        *(f"{c:>12}" for c in cells),
        f"of dense {of_dense}, over bf16 {over_bf16}, {clock};",
        "kernels alone " + ", ".join(f"{c} {value:.0f}" for c, value in alone.items()),
        flush=True,
    )
    each = f"{sizes[0]} each" if len(set(sizes)) == 1 else " ".join(map(str, sizes))
    return {
        **{"gemm": kind, "groups": len(sizes), "sizes": each, "m": m, "n": n, "k": k},
        "clock": clock,
        **dict(zip(COLUMNS, cells, strict=True)),
        **{f"{c}_kernel": f"{value:.0f}" for c, value in alone.items()},
        "of_dense": of_dense,
        "over_bf16": over_bf16,
        "pallas_blocks": "" if blocks is None else " ".join(map(str, blocks)),
    }


# What a kind's contenders are: ours, others, and Pallas' in each block shape.
_Made = tuple[dict[str, Contender], dict[str, Contender], dict[Any, Contender]]


def _fprop(kind: str, sizes: tuple[int, ...], m: int, n: int, k: int) -> _Made:
    groups = len(sizes)
    x = _contenders.operands(kind, m, groups * n, k)
    w8, w_scale, w = (
        a.reshape(groups, -1, a.shape[-1]) for a in (x.rhs8, x.rhs_scale, x.rhs)
    )
    on_device = jnp.asarray(sizes, jnp.int32)
    lhs_tile, rhs_tile = _contenders.TILES[kind]

    @jax.jit
    def run(lhs8, lhs_scale, w8, w_scale, sizes):
        return matmul.grouped_matmul(
            # Scales lie as the kernels want them: this transpose cancels.
            fp8jax.QTensor(lhs8, lhs_scale.T, lhs_tile),
            fp8jax.QTensor(w8, w_scale, rhs_tile),
            sizes,
            implementation=IMPLEMENTATION,
        )

    ours = Contender(run, (x.lhs8, x.lhs_scale, w8, w_scale, on_device))
    dense = Contender(
        _contenders.fp8_gemm(kind), (x.lhs8, x.lhs_scale, w8[0], w_scale[0])
    )
    bf16 = x.lhs, w.mT, on_device
    return (
        {"fp8jax": ours, "dense": dense},
        _bf16(_ragged.xla_rows, bf16, (x.lhs, w[0])),
        _pallas(_ragged.pallas_rows, bf16),
    )


def _wgrad(kind: str, sizes: tuple[int, ...], m: int, n: int, k: int) -> _Made:
    chunks = k // 128
    # As `quantize_grouped` lays the columns out: room for the worst sizes.
    columns = 128 * numerics.count_group_blocks(k, len(sizes), 128)
    x = _contenders.operands(kind, m, n, columns)
    on_device = jnp.asarray(sizes, jnp.int32)
    lhs_tile, rhs_tile = _contenders.TILES[kind]

    @jax.jit
    def run(lhs8, lhs_scale, rhs8, rhs_scale, sizes):
        return matmul.grouped_wgrad(
            fp8jax.QTensor(
                lhs8, lhs_scale.T if lhs_tile[0] == 1 else lhs_scale, lhs_tile
            ),
            fp8jax.QTensor(rhs8, rhs_scale.T, rhs_tile),
            sizes,
            implementation=IMPLEMENTATION,
        )

    ours = Contender(run, (*x.quantized, on_device))
    dense = (
        x.lhs8[:, :k],
        x.lhs_scale[:chunks] if lhs_tile[0] == 1 else x.lhs_scale[:, :chunks],
        x.rhs8[:, :k],
        x.rhs_scale[:chunks],
    )
    lhs, rhs = x.lhs[:, :k], x.rhs[:, :k]
    bf16 = lhs.T, rhs.T, on_device
    return (
        {
            "fp8jax": ours,
            "dense": Contender(_contenders.fp8_gemm(kind, jnp.float32), dense),
        },
        _bf16(_ragged.xla_columns, bf16, (lhs, rhs), jnp.float32),
        _pallas(_ragged.pallas_columns, bf16),
    )


def _bf16(
    by_xla: Callable[..., jax.Array],
    args: tuple[jax.Array, ...],
    pair: tuple[jax.Array, jax.Array],
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> dict[str, Contender]:
    def dense(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.matmul(lhs, rhs.T, preferred_element_type=out_dtype)

    return {
        "lax_bf16": Contender(jax.jit(by_xla), args),
        "dense_bf16": Contender(jax.jit(dense), pair),
    }


def _pallas(
    kernel: Callable[..., jax.Array], args: tuple[jax.Array, ...]
) -> dict[Any, Contender]:
    return {
        blocks: Contender(jax.jit(functools.partial(kernel, blocks=blocks)), args)
        for blocks in _ragged.BLOCKS
    }


def _fastest(
    candidates: dict[Any, Contender], expected: jax.Array | None
) -> _ragged.Blocks | None:
    """The fastest block shape of Pallas' kernel, of those that run and are right."""
    outputs = _harness.working(
        {f"pallas_bf16 in {blocks}": c.launch for blocks, c in candidates.items()}
    )
    times = {}
    for blocks, contender in candidates.items():
        out = outputs.pop(f"pallas_bf16 in {blocks}", None)
        if out is None:
            continue
        # Both round to bfloat16 at most: 2^-9 of each element, and of float32 sums.
        if expected is not None and _distance(out, expected) > 2**-7:
            print(f"pallas_bf16 in {blocks} is left out: it is not lax.ragged_dot")
            continue
        times[blocks] = _harness.kernel_us(contender.fn, *contender.args, iterations=3)
    return min(times, key=times.__getitem__, default=None)


@jax.jit
def _distance(out: jax.Array, expected: jax.Array) -> jax.Array:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)


def _times(
    contenders: dict[str, Contender], rounds: int
) -> tuple[dict[str, float], str]:
    """Microseconds of each, and by which clock."""
    first = contenders["fp8jax"]
    if _harness.kernel_us(first.fn, *first.args) >= _harness.SHORT_US:
        launch = {name: c.launch for name, c in contenders.items()}
        return _harness.alternate(launch, rounds=rounds), "wall"
    clocks = {
        name: _harness.kernel_clock(c.fn, *c.args) for name, c in contenders.items()
    }
    return _harness.alternate_clocks(clocks, rounds=rounds), "kernel"


if __name__ == "__main__":
    main()
