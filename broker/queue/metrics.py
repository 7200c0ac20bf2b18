"""Reads the counters and histograms of services: totals that outlive workers. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import redis

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys
from millstream.broker.contract.metrics import HISTOGRAMS, THOUSAND, WORK, bucket_fields, sum_field
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.views import ServiceView
from millstream.broker.transport.connection import Connection, translated

KEPT_MS = 30 * 86_400_000
"""Lifetime of a service's totals after its last heartbeat, ms."""


@dataclass(frozen=True, slots=True)
class HistogramView:
    """Values that were observed so far, by bucket. `bounds`: upper bounds; `counts` has one more, of larger values."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean of the values; None if there is none."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Returns the value that `share`, 0 to 1, of all values do not exceed; None if there is none.

        It is interpolated within a bucket, as Prometheus does. Of values above the last bound that bound is known.
        """
        rank, lower, below = share * self.count, 0.0, 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (bound - lower) * max(0.0, rank - below) / count
            lower, below = bound, below + count
        return lower if self.count else None

    def above(self, value: float) -> float:
        """Returns how many values are above `value`, interpolated within its bucket.

        Of values above the last bound nothing else is known: none of them is above a `value` beyond that bound.
        """
        found, lower = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if value < bound:
                found += count * min(1.0, (bound - value) / (bound - lower))
            lower = bound
        return found + (self.counts[-1] if value < lower else 0)

    def since(self, earlier: HistogramView) -> HistogramView:
        """Returns the values observed after `earlier` was read; all of them if the totals began again meanwhile."""
        counts = [now - before for now, before in zip(self.counts, earlier.counts, strict=True)]
        return HistogramView(self.bounds, counts, self.total - earlier.total) if min(counts) >= 0 else self


@dataclass(frozen=True, slots=True)
class ServiceMetrics:
    """The totals of one service, since it has traffic. They begin again 30 days after its last heartbeat.

    Exact: accepted `jobs` and `rows` by priority; `refused` calls by reason; `settled` jobs, the cancelled and purged
    ones included; of their rows, `ok` and `failed` by error code; jobs that were `buried`, by reason. `cached`: rows
    that clients found in the cache. `webhooks`: announcements by how they ended. `shadows`: copies of calls to other
    versions by how they ended. `work`: counters of workers by
    name, see WORK in contract/metrics.py, and `histograms` by name, both without the last second of workers that were
    killed.
    """

    service: str
    jobs: Mapping[Priority, int]
    rows: Mapping[Priority, int]
    refused: Mapping[str, int]
    settled: int
    ok: int
    failed: Mapping[str, int]
    buried: Mapping[str, int]
    cached: int
    webhooks: Mapping[str, int]
    shadows: Mapping[str, int]
    work: Mapping[str, int]
    histograms: Mapping[str, HistogramView]

    @property
    def rows_per_batch(self) -> float | None:
        """Mean rows of a forward; None before the first."""
        return self.work["rows"] / self.work["forwards"] if self.work["forwards"] else None

    def wait(self, priority: Priority) -> HistogramView:
        """Time from acceptance to the first forward, ms."""
        return self.histograms[f"wait:{priority}"]

    def total(self, priority: Priority) -> HistogramView:
        """Time from acceptance to the answer, ms."""
        return self.histograms[f"total:{priority}"]


class Metrics:
    """The totals of one server's services under one key prefix."""

    def __init__(self, connection: Connection, prefix: str = DEFAULT_PREFIX) -> None:
        self._connection = connection
        self._registry = Registry(connection, prefix)

    def read(self, service: str) -> ServiceMetrics:
        """Returns the totals of `service`; zeros if it is not registered. Raises BrokerUnavailable."""
        (found,) = self.services([service])
        return found

    def services(self, names: Sequence[str] | None = None) -> list[ServiceMetrics]:
        """Returns the totals of these services, or of all registered ones, in one round trip for any number of them.

        Raises BrokerUnavailable.
        """
        chosen = [self._registry.keys(name) for name in (self._registry.names() if names is None else names)]
        with translated(self._connection.safe_url):
            pipe = self._connection.client.pipeline(transaction=False)
            for keys in chosen:
                pipe.hgetall(keys.metrics())
            found = cast(list[Mapping[bytes, bytes]], pipe.execute())
        return [decode_metrics(keys, fields) for keys, fields in zip(chosen, found, strict=True)]


def add_cached(client: redis.Redis, keys: ServiceKeys, rows: int) -> None:
    """Adds `rows` that a client found in the cache. Raises redis.RedisError."""
    # As in the scripts: then the field is new, perhaps with its key, which heartbeats then renew.
    if client.hincrby(keys.metrics(), "cached", rows) == rows:
        client.pexpire(keys.metrics(), KEPT_MS)


def add_counts(client: redis.Redis, keys: ServiceKeys, counts: Mapping[str, int]) -> None:
    """Adds what a client counted to these fields. Raises redis.RedisError."""
    pipe = client.pipeline(transaction=False)
    for field, count in counts.items():
        if count:
            pipe.hincrby(keys.metrics(), field, count)
    pipe.pexpire(keys.metrics(), KEPT_MS)
    pipe.execute()


def decode_metrics(keys: ServiceKeys, fields: Mapping[bytes, bytes]) -> ServiceMetrics:
    """Returns the totals that the hash `fields` holds. Fields of newer versions are ignored."""
    counts = {name.decode(errors="replace"): int(value) for name, value in fields.items() if _is_whole(value)}

    def of(name: str) -> int:
        return counts.get(name, 0)

    return ServiceMetrics(
        service=keys.service,
        jobs={priority: of(f"jobs:{priority}") for priority in PRIORITIES},
        rows={priority: of(f"jobs:{priority}") + of(f"further_rows:{priority}") for priority in PRIORITIES},
        refused=_labelled(counts, "refused:"),
        settled=of("single") + of("settled"),
        ok=of("single") + of("ok"),
        failed=_labelled(counts, "failed:"),
        buried=_labelled(counts, "buried:"),
        cached=of("cached"),
        webhooks=_labelled(counts, "webhooks:"),
        shadows=_labelled(counts, "shadow:"),
        work={name: of(f"work:{name}") for name in WORK},
        histograms={name: _histogram(of, name) for name in HISTOGRAMS},
    )


def backlog_s(view: ServiceView, totals: ServiceMetrics) -> float | None:
    """Returns the seconds until all jobs that no worker holds would be answered, as fast as the service was so far.

    The time of the forwards for each job is that of the live workers, or if they have run none, that of all workers
    ever. It is divided among the live workers; without one, the seconds are those of a single worker. None if jobs wait
    and none has ever run.
    """
    if not view.depth:
        return 0.0
    jobs, busy_ms = sum(each.jobs for each in view.workers), sum(each.busy_ms for each in view.workers)
    if not jobs:
        jobs, busy_ms = totals.settled, totals.work["busy_ms"]
    if not (jobs and busy_ms):
        return None
    return view.depth * busy_ms / jobs / 1000 / max(1, len(view.workers))


def _histogram(of: Callable[[str], int], name: str) -> HistogramView:
    counts = [of(field) for field in bucket_fields(name)]
    return HistogramView(HISTOGRAMS[name], counts, of(sum_field(name)) / THOUSAND)


def _labelled(counts: Mapping[str, int], start: str) -> dict[str, int]:
    return {name.removeprefix(start): counts[name] for name in sorted(counts) if name.startswith(start)}


def _is_whole(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 19
