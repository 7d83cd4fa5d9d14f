"""What became of every matrix product, for people and for tests."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

from fp8jax.transform.analysis import Role
from fp8jax.transform.plan._table import (
    html_table,
    markdown_table,
    readable,
    readable_bytes,
    text_table,
)

# How the reason begins of a product whose weight is not known as a parameter.
WOULD_BE = "would be in FP8 if "

Status = Literal["fp8", "skipped"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One matrix product.

    Attributes:
        path: key path of its weight; the name stack, if it has none.
        role: of the product in a train step.
        m, n, k: rows, columns and contraction; for wgrad, k counts tokens.
        status: `"fp8"` or `"skipped"`.
        reason: why it was skipped, or why it is not in the fastest kernel.
        tiles: of both operands, such as `"1x128 128x128"`; `""` if skipped.
        kernel: the implementation that multiplies, `""` if skipped.
        count: how often it runs in one call, as far as scan lengths tell.
        flops: of all runs.
    """

    path: str
    role: Role
    m: int
    n: int
    k: int
    status: Status
    reason: str = ""
    tiles: str = ""
    kernel: str = ""
    count: int = 1
    flops: int = 0


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `fp8_transform` does to one function, without running it.

    Attributes:
        rows: one for each matrix product, in program order.
        unmatched_rules: patterns of the rules that were about no product.
        unmatched_custom_rules: patterns of `custom_rules` that name no function.
        notes: what else the user would not expect.
        residual_bytes: what the forward pass of a whole step keeps for its backward
            pass, but for weights and their codes; None for a forward function.
        plain_residual_bytes: the same of the function as it came.
    """

    rows: tuple[Row, ...]
    unmatched_rules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    residual_bytes: int | None = None
    plain_residual_bytes: int | None = None
    unmatched_custom_rules: tuple[str, ...] = ()

    def with_residuals(self, fp8: int, plain: int) -> "Report":
        """The report with bytes of residuals, transformed and as they came."""
        return dataclasses.replace(self, residual_bytes=fp8, plain_residual_bytes=plain)

    @property
    def flops(self) -> int:
        """FLOPs of all matrix products in one call."""
        return sum(row.flops for row in self.rows)

    @property
    def fraction(self) -> float:
        """Share of those FLOPs that is in FP8; 0 if there are none."""
        fp8 = sum(row.flops for row in self.rows if row.status == "fp8")
        return fp8 / self.flops if self.flops else 0.0

    def __str__(self) -> str:
        table = text_table(_HEAD, _lines(self.rows), _NUMBERS)
        return "\n".join((*table, *self._summary()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table and the totals as a notebook shows them."""
        return html_table(_HEAD, _lines(self.rows), self._summary())

    def to_markdown(self) -> str:
        """The table and the totals in Markdown."""
        cells = _lines(self.rows)
        return markdown_table(_HEAD, cells, _NUMBERS, self._summary())

    def to_json(self) -> str:
        """Rows, fraction, unmatched rules, notes and residuals as a JSON object."""
        return json.dumps(
            {
                "rows": [dataclasses.asdict(row) for row in self.rows],
                "fraction": self.fraction,
                "unmatched_rules": list(self.unmatched_rules),
                "unmatched_custom_rules": list(self.unmatched_custom_rules),
                "notes": list(self.notes),
                "residual_bytes": self.residual_bytes,
                "plain_residual_bytes": self.plain_residual_bytes,
            }
        )

    def _summary(self) -> list[str]:
        fp8 = [row for row in self.rows if row.status == "fp8"]
        lines = [
            f"{len(fp8)} of {len(self.rows)} matrix products in FP8: "
            f"{self.fraction:.1%} of {readable(self.flops / 1e9)} GFLOP."
        ]
        missed = [row for row in self.rows if row.reason.startswith(WOULD_BE)]
        if missed:
            share = sum(row.flops for row in missed) / max(self.flops, 1)
            lines.append(
                f"{len(missed)} more ({share:.1%}) would be in FP8 if their weights "
                "were known as parameters."
            )
        if self.residual_bytes is not None and self.plain_residual_bytes is not None:
            sizes = self.residual_bytes, self.plain_residual_bytes
            fp8, plain = map(readable_bytes, sizes)
            lines.append(f"Kept for the backward pass: {fp8}; without FP8: {plain}.")
        lines += [f"Rule that matched nothing: {p!r}" for p in self.unmatched_rules]
        lines += [
            f"Name in custom_rules that matched nothing: {p!r}"
            for p in self.unmatched_custom_rules
        ]
        return [*lines, *self.notes]


_HEAD = ["path", "role", "m", "n", "k", "count", "GFLOP", "status", "how, or why not"]
_NUMBERS = range(2, 7)


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of a table: a line per row, and one for all that have one column.

    Products with a vector, as of value heads, of norms written as products and of
    optimizers, are many and cost next to nothing.
    """
    columns = [row for row in rows if row.status == "skipped" and 1 in (row.n, row.k)]
    if len(columns) < 2:
        return [*map(_cells, rows)]
    lines = [_cells(row) for row in rows if row not in columns]
    together = Row(
        path=" | ".join(dict.fromkeys(row.path or "-" for row in columns)),
        role="other",
        m=0,
        n=1,
        k=0,
        status="skipped",
        reason=f"{len(columns)} products of one column, which report.rows lists",
        count=sum(row.count for row in columns),
        flops=sum(row.flops for row in columns),
    )
    return [*lines, _cells(together)]


def _cells(row: Row) -> list[str]:
    return [
        row.path or "-",
        row.role,
        *(str(size) if size else "?" for size in (row.m, row.n, row.k)),
        str(row.count),
        readable(row.flops / 1e9),
        row.status,
        how(row),
    ]


def how(row: Row) -> str:
    """Tiles and kernel of a product in FP8, and why another is not."""
    parts = f"{row.tiles} {row.kernel}".strip(), row.reason
    return "; ".join(part for part in parts if part)


def describe_tiles(*tiles: Sequence[int]) -> str:
    """`"1x128 128x128"` for `(1, 128), (128, 128)`."""
    return " ".join("x".join(map(str, tile)) for tile in tiles)
