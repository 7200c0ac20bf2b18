"""Every Redis key, one method each. `{service}` is the Cluster hash tag: a service's keys share a slot."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.broker.contract.job import PRIORITIES, Priority

GROUP = "workers"
"""The one consumer group of every job stream."""

RETURNED = "returned"
"""The consumer that owns what dead or confused workers gave back, until a live one claims it."""

STREAM_INDEX = {priority: index for index, priority in enumerate(PRIORITIES, start=1)}
"""How the scripts number the three job streams."""

DEFAULT_PREFIX = "ms"


def services_key(prefix: str = DEFAULT_PREFIX) -> str:
    """SET of service names; no ttl."""
    return f"{prefix}:services"


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

    def stream(self, priority: Priority) -> str:
        """STREAM of jobs; no ttl. Settled entries are XDELed, so XLEN = waiting + in flight."""
        return self._key(f"q:{priority}")

    def streams(self) -> list[str]:
        """The three job streams, most urgent first."""
        return [self.stream(priority) for priority in PRIORITIES]

    def reply(self, client: str) -> str:
        """STREAM of replies to one client process, which deletes what it read; ttl set by settle."""
        return self._key(f"reply:{client}")

    def call(self, call: str) -> str:
        """HASH of a detached call: what was submitted, and each job's reply; ttl result_ttl after the last reply."""
        return self._key(f"call:{call}")

    def result(self, job_id: str) -> str:
        """STRING: the reply of a detached job that a client of an older version sent; ttl result_ttl."""
        return self._key(f"result:{job_id}")

    def cache(self, digest: str) -> str:
        """STRING: one row's answer, kept for whoever asks again; ttl cache_ttl."""
        return self._key(f"cache:{digest}")

    def seen(self, job_id: str) -> str:
        """STRING: the entry id of an accepted job; ttl the job's life, then 20 s."""
        return self._key(f"seen:{job_id}")

    def partial(self, job_id: str) -> str:
        """STRING: what a job that streams has generated so far; ttl the job's life, and gone with its answer."""
        return self._key(f"partial:{job_id}")

    def bucket(self, tenant: str = "") -> str:
        """HASH: token bucket of the service, or of one tenant of it; ttl until it is full again."""
        return self._key(f"bucket:{tenant}" if tenant else "bucket")

    def dead(self) -> str:
        """STREAM of dead letters, capped; no ttl."""
        return self._key("dead")

    def workers(self) -> str:
        """ZSET: consumer -> its last beat, server ms; ttl a day after the last beat."""
        return self._key("workers")

    def worker(self, consumer: str) -> str:
        """HASH: what one worker process says of itself at each beat; ttl a few leases."""
        return self._key(f"worker:{consumer}")

    def cancelled(self) -> str:
        """ZSET: claimed entries their callers no longer want -> when, server ms; ttl two leases after the last."""
        return self._key("cancelled")

    def trail(self) -> str:
        """HASH: 'stream:entry id' -> a line for each run of it that did not end; the same with ':batch' -> the batch it
        ran in last, its size, and the server ms until which it waits for a second worker; ttl a day after the last.
        """
        return self._key("trail")

    def refused(self) -> str:
        """HASH: reason -> how many groups of jobs were turned away for it; ttl a day after the last."""
        return self._key("refused")

    def paused(self) -> str:
        """STRING: the service is paused; "refusing" where it takes no new jobs either; ttl only where one was given."""
        return self._key("paused")

    def reclaim(self) -> str:
        """STRING: when reclaim last passed, and until when it holds off; ttl an hour."""
        return self._key("reclaim")
