"""The tables of grouped GEMMs and of mixtures of experts."""

from benchmarks._peaks import PEAK_RATIO, PEAK_TFLOPS
from benchmarks._tables import Rows, mean, table

# What tells two mixtures apart.
MIXTURE = ("tokens", "features", "hidden", "experts", "top_k")


def grouped_summary(grouped: Rows) -> list[list[str]]:
    """Geometric means of each kind of grouped GEMM, uneven groups and all."""
    names = {"1d2d": "1x128 by 128x128", "1d1d": "wgrad", "2d1d": "wgrad, x in blocks"}
    rows = []
    for kind, name in names.items():
        of_kind = [r for r in grouped if r["gemm"] == kind]
        if len(of_kind) < 2:  # No mean of one.
            continue
        ratios = [float(r["of_dense"]) for r in of_kind]
        ours, dense = (mean(float(r[c]) for r in of_kind) for c in ("fp8jax", "dense"))
        rows.append(
            [
                f"Grouped GEMM, {name}, {len(of_kind)} shapes, TFLOPS",
                f"{ours:.0f}",
                f"{dense:.0f} our dense kernel",
                f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{PEAK_TFLOPS} peak",
            ]
        )
    return rows


def moe_summary(rows: Rows) -> list[list[str]]:
    """The first mixture in FP8, against the fastest one in BF16."""
    first = [r for r in rows if all(r[c] == rows[0][c] for c in MIXTURE)]
    bases = [r for r in first if r["contender"] in ("jax bf16", "pallas bf16")]
    if not bases:
        return []
    base = min(bases, key=lambda r: float(r["wall_us"]))
    return [
        [
            f"Mixture of {r['experts']} experts, {r['features']} by {r['hidden']}, "
            f"{r['tokens']} tokens, top {r['top_k']}, "
            f"{r['contender'].removeprefix('fp8jax ')}: a whole step, us",
            f"{float(r['wall_us']):.0f}",
            f"{float(base['wall_us']):.0f} {base['contender']}",
            f"{float(base['wall_us']) / float(r['wall_us']):.2f}",
            f"{PEAK_RATIO:.2f}",
        ]
        for r in first
        if r["contender"].startswith("fp8jax ")
    ]


def grouped_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    head = ["groups; m, n, k", "fp8jax", "dense", "of it"]
    head += ["kernels alone: fp8jax", "dense", "BF16: lax", "Pallas"]
    return [
        f"Grouped GEMMs, TFLOPS, on one {rows[0]['device']}, beside one dense product "
        "of as many FLOPs, in FP8 and in BF16, and `lax.ragged_dot` and Pallas' own "
        "kernels in BF16. 1d2d to BF16; wgrad to float32, Pallas' to BF16. Taking "
        "turns the card is hot and throttles; kernels alone are of five launches.",
        table(
            [*head, "dense", "over the best", "clock"],
            [
                [
                    f"{r['gemm']} {group_sizes(r)}; {r['m']}, {r['n']}, {r['k']}",
                    r["fp8jax"],
                    r["dense"],
                    f"{float(r['of_dense']):.2f}",
                    *(r.get(f"{c}_kernel", "") for c in ("fp8jax", "dense")),
                    *(r[c] for c in ("lax_bf16", "pallas_bf16", "dense_bf16")),
                    f"{float(r['over_bf16']):.2f}" if r["over_bf16"] else "",
                    r["clock"],
                ]
                for r in rows
            ],
        ),
    ]


def group_sizes(row: dict[str, str]) -> str:
    each = row["sizes"] if row["sizes"].endswith("each") else "uneven"
    return f"{row['groups']} x {each}"


def moe_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    return [
        f"Mixture of experts, on one {rows[0]['device']}: y and all gradients, with "
        f"routing and every quantization. TFLOPS by wall time (FP8 peak {PEAK_TFLOPS}),"
        " speed against the layer in BF16 by `lax.ragged_dot`, by Pallas' own kernels, "
        "and against a dense MLP of as many FLOPs in BF16 (ceiling "
        f"{PEAK_RATIO:.2f}).",
        table(
            [
                "tokens, in, hidden, experts, top",
                *("contender", "us", "kernels only", "TFLOPS"),
                *("over lax", "over Pallas", "over dense"),
            ],
            [
                [
                    ", ".join(r[c] for c in MIXTURE),
                    *(r[c] for c in ("contender", "wall_us", "kernel_us", "tflops")),
                    *(
                        f"{float(r[c]):.2f}" if r[c] else ""
                        for c in ("over_lax", "over_pallas", "over_dense")
                    ),
                ]
                for r in rows
            ],
        ),
    ]
