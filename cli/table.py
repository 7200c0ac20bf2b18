"""Formats tables of plain text with aligned columns, one line per row so that grep finds rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def age(ms: int | None) -> str:
    """Returns a time span as text such as 9.5s, 42s, 3m07s or 2h05m; a dash if it is None."""
    if ms is None:
        return "-"
    if ms < 10_000:
        return f"{ms / 1000:.1f}s"
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def bar(share: float, width: int = 20) -> str:
    """Returns a bar of `share` (0 to 1) of `width` characters, rounded to whole ones."""
    return "#" * round(width * share)


def quantity(count: int, noun: str) -> str:
    """Returns text such as "1 job" or "3 jobs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, digits: int) -> str:
    """Returns `value` with `digits` digits after the point; a dash if it is None."""
    return "-" if value is None else f"{value:.{digits}f}"
