"""Keeping, losing and giving back what a worker holds.

The delivery count of a pending entry is 1 + 2 x attempts + hosts lost, and only `release` and `reclaim` raise it: an
attempt is a start that did not end, not a delivery. Where nobody can say what was running, because the whole host is
gone, each job it held takes half an attempt. From one attempt on a job is a suspect: it runs alone, or in a group of
those it died with, which both scripts note in `trail`. At `max_attempts` it is buried.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import redis

from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.queue import scripts
from millstream.broker.transport.cluster import owner

LEASE_S = 5.0
LEASE_MS = round(LEASE_S * 1000)


def is_live(beat: float, now: float, lease_ms: int = LEASE_MS) -> bool:
    """The one rule of who lives: a worker whose last beat is at most one lease from now, in either direction.

    Both are ms of the server's clock. A beat can be ahead: it came after `now` was read, or the clock stepped back
    since. A step of less than a lease leaves everybody alive until their next beats; after a larger one nobody lives
    until then. The scripts quote this rule.
    """
    return abs(now - beat) <= lease_ms


SUSPECT_ATTEMPTS = 1.0
"""Attempts from which on a job runs alone, or in a group of those it died with."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a beat learned. `now`: server clock, ms. `revision`: of the service, raised by each push of its settings.

    `lost`: held entries another worker has taken over. `strangers`: entries delivered to this worker that it does not
    hold: under way to it, or delivered to a connection that was cut. `cancelled`: held entries no longer wanted, each
    named once.
    """

    now: int
    live_workers: int
    reclaim_due: bool
    revision: int = 0
    lost: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


class Lease:
    """The lease of one service's workers on the entries they hold, over one client."""

    def __init__(self, client: redis.Redis, keys: ServiceKeys, *, lease_s: float = LEASE_S) -> None:
        self._client = client
        self._keys = keys
        self._lease_ms = round(lease_s * 1000)

    def beat(self, consumer: str, status: Mapping[str, str | int], held: Collection[str]) -> Beat:
        """Say that `consumer` lives, extend what it holds, publish `status`. Once a second a process."""
        keys = [*self._keys.streams(), self._keys.workers(), self._keys.worker(consumer)]
        keys += (self._keys.reclaim(), self._keys.cancelled(), self._keys.spec())
        args: list[scripts.Argument] = [GROUP, consumer, self._lease_ms, len(status)]
        for name, value in status.items():
            args += (name, value)
        now, live, due, revision, *entries = scripts.run(self._client, "beat", keys, [*args, *held])
        lost, strangers, cancelled = ([each.decode() for each in names] for names in entries)
        return Beat(now, live, bool(due), revision, lost, strangers, cancelled)

    def release(
        self,
        consumer: str,
        *,
        started: Collection[str] = (),
        keep: Collection[str] = (),
        only: Collection[str] | None = None,
        gone: bool = False,
        how: str = "ended",
    ) -> int:
        """Give back what `consumer` holds: all but `keep`, or `only` these; `started` ones with one attempt more.

        `how` says how the consumer ended, in a line: dead letters tell it of each start. Returns how many.
        """
        named = ("but", *keep) if only is None else ("only", *only)
        keys = [*self._keys.streams(), self._keys.workers(), self._keys.worker(consumer), self._keys.trail()]
        args: list[scripts.Argument] = [GROUP, consumer, RETURNED, self._lease_ms, int(gone), _line(how)]
        args += (len(started), *started, *named)
        return int(scripts.run(self._client, "release", keys, args))

    def reclaim(self) -> int:
        """Give back what workers of lost hosts held; any process may call it at any time. Returns how many."""
        keys = [*self._keys.streams(), self._keys.workers(), self._keys.reclaim(), self._keys.trail()]
        _, returned = scripts.run(self._client, "reclaim", keys, [GROUP, RETURNED, self._lease_ms])
        return int(returned)

    def now(self) -> int:
        """Milliseconds since the epoch, by the server's clock."""
        seconds, micros = owner(self._client, self._keys.workers()).time()
        return int(seconds) * 1000 + int(micros) // 1000

    def live_workers(self) -> int:
        """Counts the workers that live by the rule of `is_live`."""
        now = self.now()
        return int(self._client.zcount(self._keys.workers(), now - self._lease_ms, now + self._lease_ms))


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
