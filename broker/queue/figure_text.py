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
    """Returns text such as "1 job" or "3,000 jobs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, digits: int) -> str:
    """Returns `value` with `digits` digits after the point; a dash if it is None."""
    return "-" if value is None else f"{value:.{digits}f}"


def rate(per_s: float | None) -> str:
    """Returns a rate with one digit after the point below 10; a dash if it is None."""
    return "-" if per_s is None else f"{per_s:.1f}" if per_s < 9.95 else f"{per_s:.0f}"


def seconds(value: float | None) -> str:
    """Returns a time span as `age` does; a dash if it is None."""
    return age(None if value is None else round(value * 1000))


def latency(ms: float | None) -> str:
    """Returns a time, ms, as text such as 3.2ms, 45ms, 1.2s; a dash if it is None."""
    if ms is None:
        return "-"
    return f"{ms:.1f}ms" if ms < 9.95 else f"{ms:.0f}ms" if ms < 999.5 else age(round(ms))


def memory(size: int) -> str:
    """Returns a number of bytes as text such as 310 MB or 1.9 GB; a dash if it is 0, which means unknown."""
    return "-" if not size else f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def iso_time(ms: int) -> str:
    """Returns a time, ms since 1970, in ISO format, UTC, such as 2026-01-31T23:59:59Z."""
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%FT%TZ}"


def attempt(line: str) -> str:
    """Returns a line of a dead letter's history with its time in ISO format instead of ms."""
    at, _, rest = line.partition(" ")
    return f"{iso_time(int(at))} {rest}" if at.isdecimal() and len(at) <= 14 else line
