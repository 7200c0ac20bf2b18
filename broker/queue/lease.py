"""Leases: how workers extend their hold on entries, lose it and give entries back.

The delivery count of a pending entry is 1 + 2 x attempts + hosts lost, and only `release` and `reclaim` raise it. An
attempt is a run that did not finish, not a delivery. If a whole host is lost, nobody knows which jobs were running, so
each job that it held is charged half an attempt. A job with one attempt or more is a suspect: it runs alone, or in a
group of jobs of the batch that it died with, which both scripts note in `trail`. A job with `max_attempts` becomes a
dead letter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, cast

import redis

from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.queue import scripts
from millstream.broker.transport.cluster import owner

LEASE_S = 5.0
"""Seconds for which a worker counts as alive after its last heartbeat."""

LEASE_MS = round(LEASE_S * 1000)


def is_live(beat: float, now: float, lease_ms: int = LEASE_MS) -> bool:
    """Tells if a worker is alive: its last heartbeat is at most one lease from now, in either direction.

    `beat` and `now` are ms of the server's clock. A heartbeat can be later than `now`, if it came after `now` was read
    or the clock stepped back since. If the clock steps by less than a lease, all workers stay alive. After a larger
    step none is alive until its next heartbeat. The scripts follow this rule.
    """
    return abs(now - beat) <= lease_ms


SUSPECT_ATTEMPTS = 1.0
"""Attempts that make a job a suspect, which runs alone or in a group of jobs that it died with."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The reply to a heartbeat. `now`: server clock, ms. `revision`: rises with each push of the service's settings.

    Entries are named 'stream:entry id'. `lost`: held entries that this worker no longer owns. `unknown`: entries
    delivered to this worker that it does not hold: the reply to its claim is under way, or the connection was cut.
    `cancelled`: held entries that were cancelled since the last heartbeat. `ready_workers`: live ones whose model is
    loaded.
    """

    now: int
    live_workers: int
    reclaim_due: bool
    revision: int = 0
    lost: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ready_workers: int = 1


class Package(NamedTuple):
    """Numbers that a worker adds to the metrics of its service, by field. Its packages have rising `number`s from 1.

    The server remembers the last number for 4 leases after a heartbeat.
    """

    number: int
    counts: Mapping[str, int]


NO_PACKAGE = Package(0, MappingProxyType({}))


class Lease:
    """The leases of one service's workers on the entries that they hold, over one client."""

    def __init__(self, client: redis.Redis, keys: ServiceKeys, *, lease_s: float = LEASE_S) -> None:
        self._client = client
        self._keys = keys
        self._lease_ms = round(lease_s * 1000)

    def beat(
        self, consumer: str, status: Mapping[str, str | int], held: Collection[str], package: Package = NO_PACKAGE
    ) -> Beat:
        """Sends a heartbeat: extends the lease on all that `consumer` owns, and publishes `status`.

        `held` names the entries that it holds. `package` is added to the metrics of the service, once however often it
        is sent. Each worker process calls this once a second.
        """
        keys = [*self._keys.streams(), self._keys.workers(), self._keys.worker(consumer)]
        keys += (self._keys.reclaim(), self._keys.cancelled(), self._keys.spec(), self._keys.metrics())
        keys.append(self._keys.standby())
        args: list[scripts.Argument] = [GROUP, consumer, self._lease_ms, len(status)]
        args += (package.number, len(package.counts))
        for name, value in (*status.items(), *package.counts.items()):
            args += (name, value)
        now, live, due, revision, *entries, ready = scripts.run(self._client, "beat", keys, [*args, *held])
        lost, unknown, cancelled = ([each.decode() for each in names] for names in entries)
        return Beat(now, live, bool(due), revision, lost, unknown, cancelled, ready)

    def release(
        self,
        consumer: str,
        *,
        started: Collection[str] = (),
        keep: Collection[str] = (),
        only: Collection[str] | None = None,
        gone: bool = False,
        how: str = "ended",
        ring: bool = True,
    ) -> int:
        """Gives back the entries of `consumer`: all but `keep`, or `only` these. Returns how many.

        Entries in `started` are charged one attempt. `how` says in one line how the consumer ended, for the history of
        dead letters. `gone`: the consumer has ended, so it is deleted. `ring` wakes
        idle workers: not if the consumer is this process, whose own claimer may be asleep and would claim again.
        """
        named = ("but", *keep) if only is None else ("only", *only)
        keys = [*self._keys.streams(), self._keys.workers(), self._keys.worker(consumer), self._keys.trail()]
        keys.append(self._keys.bell())
        args: list[scripts.Argument] = [
            GROUP,
            consumer,
            RETURNED,
            self._lease_ms,
            int(gone) + 2 * (not ring),
            _line(how),
        ]
        args += (len(started), *started, *named)
        return int(scripts.run(self._client, "release", keys, args))

    def ring(self) -> None:
        """Wakes idle workers of the service, one of which is to look at its state."""
        self._client.xadd(self._keys.bell(), {"returned": 0}, maxlen=4, approximate=False)

    def reclaim(self) -> int:
        """Gives back the entries of workers on lost hosts. Returns how many. Any process may call it at any time."""
        keys = [
            *self._keys.streams(),
            self._keys.workers(),
            self._keys.reclaim(),
            self._keys.trail(),
            self._keys.bell(),
        ]
        _, returned = scripts.run(self._client, "reclaim", keys, [GROUP, RETURNED, self._lease_ms])
        return int(returned)

    def now(self) -> int:
        """Returns the server's time, ms since the epoch."""
        seconds, micros = owner(self._client, self._keys.workers()).time()
        return int(seconds) * 1000 + int(micros) // 1000

    def has_ready_worker(self, besides: str) -> bool:
        """Whether a live worker other than `besides` has published that it is ready."""
        now = self.now()
        first, last = now - self._lease_ms, now + self._lease_ms
        live = cast(list[bytes], self._client.zrange(self._keys.workers(), first, last, byscore=True))
        names = [name.decode() for name in live]
        return any(self._client.hget(self._keys.worker(name), "state") == b"ready" for name in names if name != besides)

    def live_workers(self) -> int:
        """Counts the live workers, by the rule of `is_live`."""
        now = self.now()
        return int(self._client.zcount(self._keys.workers(), now - self._lease_ms, now + self._lease_ms))


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
