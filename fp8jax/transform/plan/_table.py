"""A report's table: as text, at most 100 columns wide, in HTML and in Markdown."""

import html
import textwrap
from collections.abc import Sequence

WIDTH = 100
_GAP = "  "
_SHORTEST_PATH = 16


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]
) -> list[str]:
    """Lines of a table whose first cells are paths and whose last are reasons.

    A path that is too long is cut in its middle. Reasons that are too long are notes
    below the table, one for all rows that have it.

    Args:
        head: of the columns.
        rows: their cells.
        numbers: columns that are aligned to the right.
    """
    middle = [_widest(i, head, rows) for i in range(1, len(head) - 1)]
    left = WIDTH - sum(middle) - len(_GAP) * (len(head) - 1)
    needed = _widest(0, head, rows)
    longest = max(left - needed, left // 2)
    reasons = [len(row[-1]) for row in (head, *rows) if len(row[-1]) <= longest]
    last = max(reasons)
    first = max(min(needed, left - last), _SHORTEST_PATH)
    notes: dict[str, int] = {}
    lines = []
    for row in (head, *rows):
        path, *cells, reason = row
        if len(reason) > last:
            reason = f"[{notes.setdefault(reason, len(notes) + 1)}]"
        lines.append((_cut(path, first), *cells, reason))
    widths = [max(len(line[i]) for line in lines) for i, _ in enumerate(head)]
    text = [_line(line, widths, numbers) for line in lines]
    text.insert(1, _GAP.join("-" * width for width in widths))
    for reason, number in notes.items():
        mark = f"[{number}] "
        text += textwrap.wrap(
            mark + reason,
            WIDTH,
            subsequent_indent=" " * len(mark),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return text


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str]
) -> str:
    """The table as a notebook shows it, with a paragraph for each line below it."""

    def row(tag: str, cells: Sequence[str]) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    lines = [row("th", head), *(row("td", cells) for cells in rows)]
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in below)
    return f"<table>{''.join(lines)}</table>{paragraphs}"


def markdown_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int],
    below: Sequence[str],
) -> str:
    """The table in Markdown, `numbers` aligned to the right, with lines below it."""
    rule = ["---:" if i in numbers else "---" for i in range(len(head))]
    # Names of several weights side by side have bars of their own.
    table = (head, rule, *rows)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join((*lines, "", *below))


def readable(number: float) -> str:
    """Four digits of a number, without an exponent."""
    if number and abs(number) < 1e-3:
        return "<0.001"
    if abs(number) >= 1e4:
        return f"{number:.0f}"
    return f"{number:.4g}"


def readable_bytes(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} B"


def _widest(i: int, head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return max(len(row[i]) for row in (head, *rows))


def _cut(path: str, width: int) -> str:
    if len(path) <= width:
        return path
    before = (width - 3) // 2  # Layers differ at the end more than at the beginning.
    return f"{path[:before]}...{path[len(path) - (width - 3 - before) :]}"


def _line(line: Sequence[str], widths: Sequence[int], numbers: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if i in numbers else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return _GAP.join(cells).rstrip()
