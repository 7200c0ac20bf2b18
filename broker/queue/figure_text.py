"""Formats figures as text, alike on the command line and in the dashboard. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def age(ms: int | None) -> str:
    """Returns a time span as text such as 9.5s, 42s, 3m07s or 2h05m; a dash if it is None."""
    if ms is None:
        return "-"
    if ms < 10_000:
        return f"{ms / 1000:.1f}s"
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def quantity(count: int, noun: str) -> str:
    """Returns text such as "1 job" or "3 jobs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, digits: int) -> str:
    """Returns `value` with `digits` digits after the point; a dash if it is None."""
    return "-" if value is None else f"{value:.{digits}f}"


def iso_time(ms: int) -> str:
    """Returns a time, ms since 1970, in ISO format, UTC, such as 2026-01-31T23:59:59Z."""
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%FT%TZ}"


def attempt(line: str) -> str:
    """Returns a line of a dead letter's history with its time in ISO format instead of ms."""
    at, _, rest = line.partition(" ")
    return f"{iso_time(int(at))} {rest}" if at.isdecimal() and len(at) <= 14 else line
