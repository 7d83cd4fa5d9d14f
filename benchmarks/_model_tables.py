"""Tables of products of public models, of narrow blocks, and of batches of products."""

import statistics

from benchmarks._models import HALVES, MODELS, TOKENS
from benchmarks._tables import Rows, mean, table

_WHAT = {
    "tune": "chosen by (of their own half)",
    "report": "reported (no choice has seen them)",
}


def gemm_models_table(rows: Rows) -> list[str]:
    """Of each half: how many shapes, and the speed over cuBLASLt's."""
    if not rows:
        return []
    lines = []
    for half in HALVES:
        of_half = [r for r in rows if r["half"] == half and r["ratio"]]
        if not of_half:
            continue
        ratios = [float(r["ratio"]) for r in of_half]
        lines.append(
            [
                _WHAT[half],
                f"{len(ratios)}",
                f"{mean(float(r['fp8jax']) for r in of_half):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{sum(ratio < 1 for ratio in ratios)}",
            ]
        )
    thousands = ", ".join(f"{tokens // 1024} k" for tokens in TOKENS)
    return [
        f"1d2d on products of {len(MODELS)} public dense models (`benchmarks._models`; "
        f"fprop and dgrad at {thousands} tokens), a random sample of each half, over "
        "cuBLASLt's blockwise kernel. Kernel time by CUPTI in turns of 8 ms, on a "
        f"{rows[0]['device']} as hot as a step has it.",
        table(["shapes", "of them", "TFLOPS", "median ratio", "ratios", "< 1"], lines),
    ]


def narrow_table(rows: Rows) -> list[str]:
    """A train step of narrow blocks in FP8 over the same in BF16."""
    if not rows:
        return []
    return [
        f"A train step of {rows[0]['layers']} blocks without attention "
        f"(`benchmarks.narrow`), on one {rows[0]['device']}: us, speed over BF16's.",
        table(
            ["tokens", "width", "in FP8", "BF16", "FP8", "speed"],
            [
                [
                    r["tokens"],
                    r["width"],
                    "the MLP" if int(r["square_in_bf16"]) else "all",
                    r["bf16_us"],
                    r["fp8_us"],
                    f"{float(r['speed']):.2f}",
                ]
                for r in rows
            ],
        ),
    ]


def batched_table(rows: Rows) -> list[str]:
    """A train step of experts as batched products in FP8 over the same in BF16."""
    if not rows:
        return []
    return [
        "A train step of experts of equal capacity as batched einsums "
        f"(`benchmarks.batched`), on one {rows[0]['device']}: us, speed over BF16's.",
        table(
            [
                "experts",
                "width, hidden",
                "rows each",
                "einsums",
                "BF16",
                "FP8",
                "speed",
            ],
            [
                [
                    r["entries"],
                    f"{r['width']}, {r['hidden']}",
                    r["rows"],
                    r["form"],
                    r["bf16_us"],
                    r["fp8_us"],
                    f"{float(r['speed']):.2f}",
                ]
                for r in rows
            ],
        ),
    ]
