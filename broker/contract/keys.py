"""The names of all Redis keys, one method each. `{service}` is the Cluster hash tag: keys of a service share a slot."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from millstream.broker.contract.job import PRIORITIES, Priority

GROUP = "workers"
"""Name of the consumer group of every job stream."""

RETURNED = "returned"
"""Name of the consumer that owns the entries that workers gave back, until a live worker claims them."""

HOST_LENGTH = 32
"""Characters of its host's name that the name of a worker begins with, at most."""

STREAM_INDEX = {priority: index for index, priority in enumerate(PRIORITIES, start=1)}
"""Number of each job stream in the scripts, 1 (most urgent) to 3."""

DEFAULT_PREFIX = "ms"


def services_key(prefix: str = DEFAULT_PREFIX) -> str:
    """SET of service names; no ttl."""
    return f"{prefix}:services"


def routes_key(prefix: str = DEFAULT_PREFIX) -> str:
    """SET of names of routes; no ttl."""
    return f"{prefix}:routes"


def upstream_key(url: str, prefix: str = DEFAULT_PREFIX) -> str:
    """HASH: limit of the server at `url`, and the requests that each worker has running there; ttl an hour."""
    return f"{prefix}:upstream:{hashlib.sha256(url.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class ServiceKeys:
    """The keys of one service."""

    service: str
    prefix: str = DEFAULT_PREFIX

    def _key(self, rest: str) -> str:
        return f"{self.prefix}:{{{self.service}}}:{rest}"

    def spec(self) -> str:
        """HASH: spec as JSON, limits as fields, version; no ttl; written by `up` and `config push` only."""
        return self._key("service")

    def pinned(self, call: str) -> str:
        """STRING: the version that a detached call with an idempotency key went to; ttl PINNED_MS of routes.py."""
        return self._key(f"pinned:{call}")

    def canary(self) -> str:
        """HASH: the canary of the route of this name, and its driver's lease; gone when the weights are changed."""
        return self._key("canary")

    def drift(self) -> str:
        """HASH: vectors of fixed texts that an embedding service gave, kept by `doctor --drift`; no ttl."""
        return self._key("drift")

    def stream(self, priority: Priority) -> str:
        """STREAM of jobs; no ttl. Settled entries are deleted, so XLEN = waiting + in flight."""
        return self._key(f"q:{priority}")

    def streams(self) -> list[str]:
        """The three job streams, most urgent first."""
        return [self.stream(priority) for priority in PRIORITIES]

    def bell(self) -> str:
        """STREAM that wakes idle workers if jobs were given back, and if new ones came to a service with `fair`.

        At most 16 entries; no ttl.
        """
        return self._key("bell")

    def index(self, priority: Priority) -> str:
        """ZSET: jobs that wait, by tenant, of a service with `fair`; no ttl, gone with the last job that waits."""
        return self._key(f"index:{priority}")

    def turn(self, priority: Priority) -> str:
        """ZSET: tenant with waiting jobs -> its virtual time, see fair.lua; no ttl, gone with the index."""
        return self._key(f"turn:{priority}")

    def past(self, priority: Priority) -> str:
        """ZSET: tenant without waiting jobs -> its virtual time, while that is ahead; ttl a day after a claim."""
        return self._key(f"past:{priority}")

    def parked(self, priority: Priority) -> str:
        """ZSET: tenant that has max_in_flight jobs in flight -> when that was seen, server ms; no ttl, as turn."""
        return self._key(f"parked:{priority}")

    def in_flight(self) -> str:
        """ZSET: jobs in flight, by tenant, of a service with max_in_flight; ttl a day after a claim."""
        return self._key("in_flight")

    def tenants(self) -> str:
        """HASH: job in flight -> its tenant, of a service with max_in_flight; ttl a day after a claim."""
        return self._key("tenants")

    def reply(self, client: str) -> str:
        """STREAM of replies to one client process, which deletes the replies that it has read; ttl set by settle."""
        return self._key(f"reply:{client}")

    def call(self, call: str) -> str:
        """HASH of a detached call: its payload, and each job's reply; ttl result_ttl after the last reply."""
        return self._key(f"call:{call}")

    def webhooks(self) -> str:
        """STREAM of calls that are done and whose webhook is to be told; capped; ttl two days after the last one."""
        return self._key("webhooks")

    def webhook(self, call: str) -> str:
        """STRING: how the last attempt to tell a call's webhook ended, as JSON; ttl a day after it."""
        return self._key(f"webhook:{call}")

    def result(self, job_id: str) -> str:
        """STRING: the reply to a detached job that a client of an older version sent; ttl result_ttl."""
        return self._key(f"result:{job_id}")

    def cache(self, digest: str) -> str:
        """STRING: the cached result of one row; ttl cache_ttl."""
        return self._key(f"cache:{digest}")

    def seen(self, job_id: str) -> str:
        """STRING: stream and entry id of an accepted job, as '1:entry id'; ttl the job's life, then 20 s."""
        return self._key(f"seen:{job_id}")

    def partial(self, job_id: str) -> str:
        """STRING: what a job that streams has generated so far; ttl the job's life, and gone with its answer."""
        return self._key(f"partial:{job_id}")

    def bucket(self, tenant: str = "") -> str:
        """HASH: token bucket of the service or of one of its tenants; ttl until it is full again."""
        return self._key(f"bucket:{tenant}" if tenant else "bucket")

    def dead(self) -> str:
        """STREAM of dead letters, capped; no ttl."""
        return self._key("dead")

    def workers(self) -> str:
        """ZSET: consumer -> its last heartbeat, server ms; ttl a day after the last heartbeat."""
        return self._key("workers")

    def standby(self) -> str:
        """ZSET: live worker that has to load its model first -> its last heartbeat, server ms; ttl a day after it."""
        return self._key("standby")

    def worker(self, consumer: str) -> str:
        """HASH: status of one worker process, written at each heartbeat; ttl 4 leases."""
        return self._key(f"worker:{consumer}")

    def supervisors(self) -> str:
        """HASH: 'host:pid' of a supervisor -> its state, as JSON; ttl a day after the last one was written."""
        return self._key("supervisors")

    def drained(self) -> str:
        """HASH: worker or host -> drain or stop, until it may start again; ttl a day after the last order was used."""
        return self._key("drained")

    def cancelled(self) -> str:
        """ZSET: claimed entries that their callers cancelled -> when, server ms; ttl two leases after the last."""
        return self._key("cancelled")

    def trail(self) -> str:
        """HASH: 'stream:entry id' -> one line for each of its runs that did not finish. 'stream:entry id:batch' -> the
        batch it ran in last, the batch's size, and the server ms until which it waits for a second live worker. ttl a
        day after the last run.
        """
        return self._key("trail")

    def refused(self) -> str:
        """HASH: reason -> number of refused calls; ttl a day after the last refusal."""
        return self._key("refused")

    def metrics(self) -> str:
        """HASH: the service's counters and histograms, see metrics.py; ttl 30 days after the last heartbeat."""
        return self._key("metrics")

    def paused(self) -> str:
        """STRING that exists while the service is paused; "refusing" if it refuses new jobs; ttl if the pause ends."""
        return self._key("paused")

    def reclaim(self) -> str:
        """STRING: the last pass of reclaim, and the end of its hold, both server ms; ttl an hour."""
        return self._key("reclaim")
