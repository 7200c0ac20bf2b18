"""Tables of plain text: aligned for the eye, one line a row for grep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def harmless(text: str) -> str:
    """`text` with its control characters escaped: they could act on the terminal."""
    return text.translate(_CONTROL)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """`rows`, the heading first, as lines of equal columns."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def age(ms: int | None) -> str:
    """A time span, with the precision that its length deserves; a dash for none."""
    if ms is None:
        return "-"
    if ms < 10_000:
        return f"{ms / 1000:.1f}s"
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def bar(share: float, width: int = 20) -> str:
    """`share` (0 to 1) of `width` characters, to the nearest one."""
    return "#" * round(width * share)


def counted(count: int, noun: str) -> str:
    """Such as "1 job" or "3 jobs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, digits: int) -> str:
    """`value` with so many digits after the point; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
