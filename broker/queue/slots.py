"""Slots of servers that already run, shared by the workers of one Redis server through one key for each URL."""

from __future__ import annotations

import redis

from millstream.broker.contract.keys import DEFAULT_PREFIX, upstream_key
from millstream.broker.contract.slots import Demand, Slots
from millstream.broker.queue import scripts

LEASE_MS = 3_000
"""Milliseconds for which a worker's requests count after its last call. A dead worker's requests end about then."""

TTL_MS = 3_600_000
"""Milliseconds for which a server's limit is remembered after the last call."""


class SharedSlots:
    """The slots of the server at `url`. `consumer` names the worker process. Raises redis errors from each call."""

    def __init__(self, client: redis.Redis, url: str, consumer: str, prefix: str = DEFAULT_PREFIX) -> None:
        self._client = client
        self._key = upstream_key(url, prefix)
        self.consumer = consumer

    def exchange(self, demand: Demand, version: int, state: str) -> Slots:
        """Reports this worker's demand. Writes `state`, if it is not empty and `version` is still the current one."""
        return self._call(demand, version, state, LEASE_MS)

    def leave(self) -> None:
        """Gives this worker's slots to the others."""
        self._call(Demand(0, 0), 0, "", 0)

    def _call(self, demand: Demand, version: int, state: str, lease_ms: int) -> Slots:
        args: list[scripts.Argument] = [self.consumer, lease_ms, *demand, version, state, TTL_MS]
        now, current, text, *rest = scripts.run(self._client, "slots", [self._key], args)
        workers = {rest[at].decode(): Demand(rest[at + 1], rest[at + 2]) for at in range(0, len(rest), 3)}
        return Slots(now, current, text.decode(), workers)
