"""What tables of a report are put together from: names, numbers, and the Markdown of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def name_of(entry: Record) -> str:
    """A method with its budget, as the tables call it."""
    return entry["method"] + (f" ({entry['budget']})" if entry["budget"] else "")


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(entry: Record, figure: str, digits: int = 2) -> str:
    """A figure of an entry and its interval, "2.21 (2.05-2.38)"; alone where it has none, or one without width."""
    value, interval = entry.get(figure), entry.get(f"{figure}_interval")
    if value is None or interval is None or interval[0] == interval[1]:
        return number(value, digits)
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
