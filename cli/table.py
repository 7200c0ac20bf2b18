"""Formats tables of plain text with aligned columns, one line per row so that grep finds rows."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from millstream.broker.queue.figure_text import age, number, quantity

__all__ = ["age", "align", "bar", "escape", "number", "quantity"]

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}

_LEAST_ROOM = 20
"""Characters of a line of text at least, however narrow the terminal is."""


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


def span(ms: int | None) -> str:
    """Returns a time span as `age` does, but in ms below a second."""
    return f"{ms}ms" if ms is not None and 0 <= ms < 1000 else age(ms)


def bar(share: float, width: int = 20) -> str:
    """Returns a bar of `share` (0 to 1) of `width` characters, rounded to whole ones."""
    return "#" * round(width * share)


def fit(rows: Iterable[Sequence[str]], width: int | None, spare: Sequence[str] = ()) -> str:
    """Returns `rows` as `align` does, in lines of at most `width` characters; None: of any length.

    If the lines are longer, columns whose headings are in `spare` are left out, the first one of `spare` first, until
    they fit. What is still too long is cut.
    """
    lines = [list(row) for row in rows]
    for heading in spare:
        if width is None or _width(lines) <= width:
            break
        lines = _without(lines, heading)
    return "\n".join(cut(line, width) for line in align(lines).split("\n"))


def describe(facts: Sequence[tuple[str, str]], width: int | None) -> str:
    """Returns one line for each name and its text. Texts that are longer than `width` go on below, words whole."""
    label = max((len(name) for name, _ in facts), default=0) + 2
    if width is None:
        return "\n".join(f"{name:{label}}{text}".rstrip() for name, text in facts)
    room = max(_LEAST_ROOM, width - label)
    return "\n".join(
        f"{name if at == 0 else '':{label}}{line}".rstrip()
        for name, text in facts
        for at, line in enumerate(textwrap.wrap(text, room, break_on_hyphens=False) or [""])
    )


def cut(text: str, width: int | None) -> str:
    """Returns `text` in at most `width` characters, with three dots at its end if some are missing."""
    if width is None or len(text) <= width:
        return text
    return f"{text[: max(0, width - 3)]}..."[: max(0, width)]


def _width(lines: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) - 2


def _without(lines: Sequence[Sequence[str]], heading: str) -> list[list[str]]:
    """Returns `lines` without the column of this heading; unchanged if there is none."""
    found = [at for at, cell in enumerate(lines[0]) if cell == heading]
    return [[cell for at, cell in enumerate(line) if at not in found] for line in lines]


def terminal_width() -> int | None:
    """Returns the columns of the terminal that standard output is, None if it is none: then nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
