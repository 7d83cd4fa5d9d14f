"""Markdown tables of results, and what they are measured against."""

import math
from collections.abc import Iterable

PEAK_TFLOPS = 1979  # Dense FP8 of an H100 or H200, by the data sheet.
PEAK_RATIO = 2.0  # Of FP8's peak to BF16's.

Rows = list[dict[str, str]]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
