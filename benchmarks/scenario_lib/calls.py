"""Calls with the time each took and how it ended, and the table and targets that scenarios make of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from measure import Cell, Sample, Target, percentile

from millstream.broker.contract.errors import MillstreamError

ANSWERED, UNTYPED, ENDLESS = "answered", "untyped", "endless"
HEADING = ("calls", "number", "ended by", "p50 s", "p99 s", "max s")


@dataclass(frozen=True, slots=True)
class Ended:
    """One call: seconds until it ended, and ANSWERED, the name of its error, or UNTYPED with one that is not ours."""

    seconds: float
    how: str


def timed(call: Callable[[], object]) -> Ended:
    began = time.perf_counter()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - how a call ends is what is measured
        return Ended(time.perf_counter() - began, name_of(error))
    return Ended(time.perf_counter() - began, ANSWERED)


async def timed_async(call: Callable[[], Awaitable[object]], due: float | None = None) -> Ended:
    """As `timed`; the time counts from `due` (perf_counter seconds), if that is given."""
    began = time.perf_counter() if due is None else due
    try:
        await call()
    except asyncio.CancelledError:
        return Ended(float("inf"), ENDLESS)
    except Exception as error:  # noqa: BLE001 - how a call ends is what is measured
        return Ended(time.perf_counter() - began, name_of(error))
    return Ended(time.perf_counter() - began, ANSWERED)


def name_of(error: BaseException) -> str:
    name = type(error).__name__
    return name if isinstance(error, MillstreamError) else f"{UNTYPED} {name}"


def counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common()) or "-"


def row(name: str, ended: Sequence[Ended]) -> list[Cell]:
    seconds = [each.seconds for each in ended]
    return [
        name,
        len(ended),
        counted([each.how for each in ended]),
        percentile(seconds, 0.5),
        percentile(seconds, 0.99),
        max(seconds, default=float("nan")),
    ]


def typed(name: str, ended: Sequence[Ended]) -> Target:
    strange = sum(each.how.startswith((UNTYPED, ENDLESS)) for each in ended)
    return at_most(f"{name}: ended by an error that is not typed, or never", strange, 0)


def longest(name: str, ended: Sequence[Ended], limit_s: float) -> Target:
    return at_most(f"{name}: longest, s", max((each.seconds for each in ended), default=float("nan")), limit_s)


def at_most(name: str, value: float, limit: float) -> Target:
    return Target(name, Sample((float(value),)), "<=", limit)


def at_least(name: str, value: float, limit: float) -> Target:
    return Target(name, Sample((float(value),)), ">=", limit)
