"""Formats tables of plain text with aligned columns, one line per row so that grep finds rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millstream.broker.queue.figure_text import age, number, quantity

__all__ = ["age", "align", "bar", "escape", "number", "quantity"]

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def escape(text: str) -> str:
    """Returns `text` with its control characters escaped, because they could control the terminal."""
    return text.translate(_CONTROL)


def align(rows: Iterable[Sequence[str]]) -> str:
    """Returns `rows` as lines with aligned columns; the first row is the heading."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def bar(share: float, width: int = 20) -> str:
    """Returns a bar of `share` (0 to 1) of `width` characters, rounded to whole ones."""
    return "#" * round(width * share)
