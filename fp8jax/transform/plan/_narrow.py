"""Tells of layers so narrow that FP8 takes longer than BF16.

Products of a weight [k, n] save time by their FLOPs, 6 k n for each row of x, and their
operands are quantized at the cost of bytes, some 4 (k + n) for each. FLOPs for a byte
go with k n / (k + n): of a square weight, half its width.
"""

from collections.abc import Iterable

from fp8jax.transform.plan._report import Row

# Of k n / (k + n), below which FP8 costs more than it saves. Steps of blocks of four
# square weights and an MLP of four widths take 1.12 of BF16's time at a width of 512,
# 1.03 at 768 and 0.91 at 1024 (benchmarks.narrow on an H200), as much at 825. There, by
# the model, 16 d^2 = least * 23 d.
LEAST = 570
_SHOWN = 3  # Paths in the note.
_FASTEST = "mosaic_gpu"  # What was measured.


def narrow_notes(rows: Iterable[tuple[Row, tuple[int, int]]]) -> tuple[str, ...]:
    """A note on the weights of which FP8 products do not pay, if there are any.

    Args:
        rows: of products in FP8, with the weight's input and output features.
    """
    in_fp8 = [(row, features) for row, features in rows if row.kernel == _FASTEST]
    narrow = [(row, (k, n)) for row, (k, n) in in_fp8 if k * n < LEAST * (k + n)]
    if not narrow:
        return ()
    share = sum(row.flops for row, _ in narrow) / sum(row.flops for row, _ in in_fp8)
    names = dict.fromkeys(f"{row.path} [{k}, {n}]" for row, (k, n) in narrow)
    shown = ", ".join([*names][:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"Narrow weights, {share:.1%} of the FLOPs in FP8: {shown}{more}. On Hopper "
        f"GPUs FP8 is not faster where k n / (k + n) is below {LEAST}: min_dim= or a "
        "Rule leaves them as they are; .profile(*args) measures it.",
    )
