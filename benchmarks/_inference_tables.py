"""Tables of decoding and prefill with FP8 weights."""

from benchmarks._peaks import PEAK_RATIO
from benchmarks._tables import Rows, table

# By name in the table, the columns of a time and of a speed.
_TIMES = {"queued": "queued", "by wall clock": "wall", "kernels only": "kernel"}
_BASE, _SHOWN = "jax bf16", "16"  # Tokens of the row in README.md.


def inference_summary(rows: Rows) -> list[list[str]]:
    """The fastest contender in FP8 at 16 tokens."""
    of_m = {r["contender"]: r for r in rows if r["m"] == _SHOWN}
    base = of_m.pop(_BASE, None)
    if base is None or not of_m:
        return []
    best = min(of_m.values(), key=lambda r: float(r["queued_us"]))
    return [
        [
            f"Decode {_SHOWN} tokens, a 7B layer, {best['contender']}, us",
            f"{float(best['queued_us']):.0f}",
            f"{float(base['queued_us']):.0f} BF16",
            f"{float(best['queued_speedup']):.2f}",
            f"{PEAK_RATIO:.2f}",
        ]
    ]


def inference_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    return [
        "A layer of a 7B decoder with FP8 weights (`benchmarks.inference`), without "
        f"its attention, on one {rows[0]['device']}: us, and speed against BF16 (a "
        f"byte a weight for two: ceiling {PEAK_RATIO:.2f}). Queued: launches ahead of "
        "the device. By wall clock: one behind the other from Python, which for a step "
        "of 8 layers and its hundred arguments takes the host about as long.",
        table(
            ["tokens", "contender", *_TIMES, *(f"speed, {t}" for t in _TIMES)],
            [
                [
                    *(r[c] for c in ("m", "contender")),
                    *(r[f"{c}_us"] for c in _TIMES.values()),
                    *(f"{float(r[f'{c}_speedup']):.2f}" for c in _TIMES.values()),
                ]
                for r in rows
            ],
        ),
    ]
