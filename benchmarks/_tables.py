"""Markdown tables of results."""

import math
from collections.abc import Iterable

Rows = list[dict[str, str]]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
