"""Tables of decoding and prefill with FP8 weights."""

from benchmarks._tables import PEAK_RATIO, Rows, table

_BASE, _SHOWN = "jax bf16", "16"  # Tokens of the row in README.md.


def inference_summary(rows: Rows) -> list[list[str]]:
    """The fastest contender in FP8 at 16 tokens."""
    of_m = {r["contender"]: r for r in rows if r["m"] == _SHOWN}
    base = of_m.pop(_BASE, None)
    if base is None or not of_m:
        return []
    best = min(of_m.values(), key=lambda r: float(r["wall_us"]))
    return [
        [
            f"Decode {_SHOWN} tokens, a 7B layer, {best['contender']}, us",
            f"{float(best['wall_us']):.0f}",
            f"{float(base['wall_us']):.0f} BF16",
            f"{float(best['wall_speedup']):.2f}",
            f"{PEAK_RATIO:.2f}",
        ]
    ]


def inference_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    return [
        "A layer of a 7B decoder with FP8 weights (`benchmarks.inference`), without "
        f"its attention, on one {rows[0]['device']}: us, and speed against BF16 (a "
        f"byte a weight for two: ceiling {PEAK_RATIO:.2f}).",
        table(
            ["tokens", "contender", "us", "kernels only", "speed", "kernels only"],
            [
                [
                    *(r[c] for c in ("m", "contender", "wall_us", "kernel_us")),
                    *(f"{float(r[c]):.2f}" for c in ("wall_speedup", "kernel_speedup")),
                ]
                for r in rows
            ],
        ),
    ]
