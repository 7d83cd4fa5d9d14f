"""Tables for people on a terminal, and for programs that a command is piped to."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Beyond it rich lays a table out for longer than its numbers took to find.
_MOST_ROWS = 2000
_GAP = "  "


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: on a terminal as wide as that is, elsewhere with whole cells.

    Args:
        columns: their heads; one that begins with `>` is aligned to the right, and the
            first is a name, which is folded where it is too long for the terminal.
        rows: of cells; control characters in them are escaped.
    """
    cells = [[_printable(cell) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal and len(cells) <= _MOST_ROWS:
        console.print(_for_people(columns, cells))
    else:
        sys.stdout.writelines(_for_programs(columns, cells))


def _printable(text: str) -> str:
    """Control characters, as of a name that would move the cursor, are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _for_people(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        justify = "right" if column.startswith(">") else "left"
        overflow = "ellipsis" if i else "fold"
        table.add_column(column.lstrip(">"), justify=justify, overflow=overflow)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _for_programs(columns: Sequence[str], rows: list[list[str]]) -> Iterable[str]:
    heads = [column.lstrip(">") for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    right = [column.startswith(">") for column in columns]
    for row in (heads, ["-" * width for width in widths], *rows):
        aligned = (
            cell.rjust(width) if of_right else cell.ljust(width)
            for cell, width, of_right in zip(row, widths, right, strict=True)
        )
        yield _GAP.join(aligned).rstrip() + "\n"
