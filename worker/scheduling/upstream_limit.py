"""Finds how many requests a server runs at once: additive increase, multiplicative decrease. Pure: time is an argument.

All workers of a server share one limit. A worker that has rows waiting while the limit is used raises it by a step and
waits. If the server refuses a request (HTTP 429 or 503) or its queue grows before the next step is due, the limit goes
back to the last value at which nothing was refused. If a request is refused at such a value, the server can do less
than before, and the limit falls by the part of the requests that were refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from millstream.broker.contract.slots import Demand

START = 4
"""Requests at once before anything is known of a server."""

MOST = 512
"""Requests at once that no limit exceeds."""

FIRST_STEP_MS, STEP_MS, LONGEST_STEP_MS = 1_000, 2_000, 6_000
"""Milliseconds between two steps up: while nothing was ever refused, the limit doubles each time; afterwards; and after
several steps in a row that were refused."""

QUICK_STEPS = 3
"""Steps up in a row without a refusal after which the next ones are twice as large."""

CUT_MS = 500
"""Milliseconds between two steps down. Requests that began before a step say nothing about the limit after it."""

LEAST_CUT, LARGEST_CUT = 0.9, 0.5
"""Factors by which a limit falls, if few or most of the requests were refused."""

LONGEST_HOLD_MS = 60_000
"""Milliseconds for which a server's Retry-After is obeyed at most."""

TURN_MS = 1_000
"""Milliseconds for which a worker has one slot more than others, if they cannot be divided evenly."""


class Limit(NamedTuple):
    """The limit of one server, as its workers share it.

    `requests`: most at once. `proven`: the last value at which nothing was refused, 0 if unknown. `changed_at`: clock,
    ms, of the last step. `held_until`: clock, ms, before which no request is sent. `steps`: steps up since a refusal.
    `refusals`: steps up in a row that were refused. `has_met`: whether the server ever refused a request.
    """

    requests: int = START
    proven: int = 0
    changed_at: int = 0
    held_until: int = 0
    steps: int = 0
    refusals: int = 0
    has_met: bool = False

    @classmethod
    def read(cls, text: str) -> Limit:
        """Returns the limit that `text` holds; the first one if it holds none that this version can read."""
        try:
            requests, proven, changed_at, held_until, steps, refusals, has_met = map(int, text.split())
        except ValueError:
            return cls()
        limit = cls(requests, proven, changed_at, held_until, steps, refusals, bool(has_met))
        return limit if 1 <= limit.requests <= MOST else cls()

    def text(self) -> str:
        return " ".join(str(int(each)) for each in self)

    @property
    def step_ms(self) -> int:
        """Milliseconds from the last step until the next step up is due."""
        if not self.has_met:
            return FIRST_STEP_MS
        return min(LONGEST_STEP_MS, STEP_MS << min(self.refusals, 4))

    @property
    def is_probe(self) -> bool:
        """Whether the last step went up, and its outcome is not known yet."""
        return 0 < self.proven < self.requests


class Signals(NamedTuple):
    """Signals of the server to one worker since its last report.

    `refused`: requests that the server refused, of `begun`. `refused_at`: clock, ms, at which the latest of them began.
    `retry_ms`: its Retry-After. `queues`: whether requests wait inside the server.
    """

    begun: int = 0
    refused: int = 0
    refused_at: int = 0
    retry_ms: int = 0
    queues: bool = False


def next_limit(limit: Limit, signals: Signals, workers: Mapping[str, Demand], now: int) -> Limit:
    """Returns the limit after `signals`, at `now`, clock, ms. It is the same one if no step is due."""
    if limit.changed_at > now:
        # The clock was set back.
        limit = limit._replace(changed_at=now, held_until=min(limit.held_until, now))
    since_ms = now - limit.changed_at
    if signals.refused and signals.refused_at >= limit.changed_at and since_ms >= (0 if limit.is_probe else CUT_MS):
        return _refused(limit, signals, sum(each.running for each in workers.values()), now)
    if signals.queues and since_ms >= CUT_MS:
        return _too_many(limit, now)
    if since_ms >= limit.step_ms and not signals.refused and any(each.waiting for each in workers.values()):
        return _raised(limit, now)
    return limit


def _refused(limit: Limit, signals: Signals, running: int, now: int) -> Limit:
    met = limit._replace(changed_at=now, steps=0, has_met=True)
    if limit.is_probe:
        return met._replace(requests=limit.proven, refusals=limit.refusals + 1)
    part = 1 - signals.refused / max(signals.begun, running + signals.refused)
    requests = math.floor(limit.requests * max(LARGEST_CUT, min(LEAST_CUT, part)))
    held_until = now + min(LONGEST_HOLD_MS, signals.retry_ms)
    return met._replace(requests=max(1, requests), proven=0, refusals=0, held_until=held_until)


def _too_many(limit: Limit, now: int) -> Limit:
    """The limit after a sign that requests wait inside the server. Such a sign alone never goes below START."""
    met = limit._replace(changed_at=now, steps=0, has_met=True)
    if limit.is_probe:
        return met._replace(requests=limit.proven, refusals=limit.refusals + 1)
    if limit.requests <= START:
        return limit
    return met._replace(requests=max(START, math.floor(limit.requests * LEAST_CUT)), proven=0)


def _raised(limit: Limit, now: int) -> Limit:
    """The limit one step up. Nothing was refused since the last step, so the value before is proven."""
    step = max(1, limit.requests // 16) << min(5, limit.steps // QUICK_STEPS) if limit.has_met else limit.requests
    requests = min(MOST, limit.requests + max(1, min(step, limit.requests // 2 if limit.has_met else step)))
    # A step that held is no longer the beginning of a row of refused ones.
    refusals = 0 if limit.is_probe else limit.refusals
    return limit._replace(
        requests=requests, proven=limit.requests, changed_at=now, steps=limit.steps + 1, refusals=refusals
    )


def parts(limit: int, workers: Mapping[str, Demand], now: int) -> dict[str, int]:
    """Requests that each worker may have running, by consumer; together at most `limit`.

    Slots go one by one to the worker that has the fewest of them and needs more; an idle worker needs one to begin.
    Slots that nobody needs are divided evenly. One that cannot be divided changes hands once in TURN_MS.
    """
    names = sorted(workers)
    if names:
        turn = now // TURN_MS % len(names)
        names = names[turn:] + names[:turn]
    given = dict.fromkeys(names, 0)
    for _ in range(limit):
        needy = [name for name in names if given[name] < max(1, sum(workers[name]))]
        if not needy:
            break
        given[min(needy, key=given.__getitem__)] += 1
    spare = limit - sum(given.values())
    for at, name in enumerate(names):
        given[name] += spare // len(names) + (at < spare % len(names))
    return given


def allowed(limit: Limit, consumer: str, workers: Mapping[str, Demand], now: int) -> int:
    """Requests that `consumer` may have running now.

    It is less than its part while other workers still run more than theirs.
    """
    if now < limit.held_until:
        return 0
    others = sum(each.running for name, each in workers.items() if name != consumer)
    part = parts(limit.requests, workers, now).get(consumer, 0)
    return min(part, max(0, limit.requests - others))


class Delays:
    """Sees a queue inside a server in the times until answers begin.

    A single answer may take long for many reasons. If even the fastest of a second's answers takes FACTOR times as long
    as the fastest of the last minute, all requests wait.
    """

    FACTOR, LEAST_S = 3.0, 0.1
    WINDOW_S, MEMORY_S = 1.0, 60.0
    FEWEST = 5
    """Answers in a window below which it says nothing."""

    def __init__(self) -> None:
        self._window: list[float] = []
        self._window_began = 0.0
        self._fastest: list[tuple[float, float]] = []

    def observe(self, seconds: float, now: float) -> bool:
        """Notes that an answer began `seconds` after its request, at `now`, monotonic seconds.

        Returns whether requests wait inside the server, once at the end of a window.
        """
        if now - self._window_began < self.WINDOW_S or len(self._window) < self.FEWEST:
            if not self._window:
                self._window_began = now
            self._window.append(seconds)
            return False
        fastest = min(self._window)
        self._window, self._window_began = [seconds], now
        self._fastest = [(at, each) for at, each in self._fastest if now - at < self.MEMORY_S and each < fastest]
        best = min((each for _, each in self._fastest), default=fastest)
        self._fastest.append((now, fastest))
        return fastest > max(self.LEAST_S, self.FACTOR * best)


class Backoff:
    """Pauses that double with each failure in a row, from `first_s` to `longest_s` seconds."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._pause_s = 0.0
        self.until = 0.0
        """Monotonic seconds until which the pause lasts; 0.0 if there is none."""

    def fail(self, now: float, least_s: float = 0.0) -> float:
        """Begins the next pause, of at least `least_s` seconds. Returns its length."""
        self._pause_s = min(self._longest_s, max(self._first_s, 2 * self._pause_s))
        length = max(self._pause_s, least_s)
        self.until = now + length
        return length

    def succeed(self) -> None:
        self._pause_s = self.until = 0.0
