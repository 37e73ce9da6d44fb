"""Tables as text and in Markdown: rows of cells, the header first, and notes below them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Rows = Sequence[Sequence[str]]


def text(rows: Rows, notes: Sequence[str]) -> str:
    """Columns of one width, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *notes])


def markdown(rows: Rows, notes: Sequence[str]) -> str:
    """A table of GitHub's Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)])


def percent(fraction: float) -> str:
    """A share in % to one digit; a dash for NaN."""
    return "–" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
