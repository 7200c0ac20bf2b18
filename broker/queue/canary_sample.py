"""Samples of what versions of a route did, for the judge of a canary: calls, failures and latencies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from millstream.broker.contract.errors import Cancelled, fault_of
from millstream.broker.contract.metrics import HISTOGRAMS
from millstream.broker.queue.metrics import HistogramView, ServiceMetrics

LATENCY = "latency"
"""Histogram by which versions are compared: time from acceptance to the answer, ms, of all priorities."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals of some services at one time, or what was added between two times.

    `calls` are settled jobs: a short call is one job. `rows` are those that were answered or failed, and `failed` those
    that failed by no fault of their caller, or were cancelled: a caller that falls back cancels. `latency` is in ms.
    """

    calls: int
    rows: int
    failed: int
    latency: HistogramView

    @classmethod
    def of(cls, services: Iterable[ServiceMetrics]) -> Sample:
        """Returns the sum of the totals of `services`."""
        found = list(services)
        counts = [sum(column) for column in zip(*(each.histograms[LATENCY].counts for each in found), strict=True)]
        failed = [(code, count) for each in found for code, count in each.failed.items()]
        return cls(
            calls=sum(each.settled for each in found),
            rows=sum(each.ok for each in found) + sum(count for _, count in failed),
            failed=sum(count for code, count in failed if _is_failure(code)),
            latency=_view(counts or _zeros()),
        )

    def since(self, earlier: Sample) -> Sample | None:
        """Returns what was added after `earlier`; None if the totals began again meanwhile."""
        counts = [now - then for now, then in zip(self.latency.counts, earlier.latency.counts, strict=True)]
        calls, rows, failed = self.calls - earlier.calls, self.rows - earlier.rows, self.failed - earlier.failed
        if min(calls, rows, failed, *counts) < 0:
            return None
        return Sample(calls, rows, failed, replace(self.latency, counts=counts))

    @property
    def error_rate(self) -> float:
        """Share of the rows that failed, 0 to 1."""
        return self.failed / self.rows if self.rows else 0.0

    @property
    def p99_ms(self) -> float | None:
        """99th percentile of the time to the answer, ms; None if nothing ran."""
        return self.latency.quantile(0.99)

    def to_record(self) -> dict[str, object]:
        """Returns the sample as JSON's types, without the empty buckets."""
        counts = {str(at): count for at, count in enumerate(self.latency.counts) if count}
        return {"calls": self.calls, "rows": self.rows, "failed": self.failed, "latency": counts}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Sample:
        """Returns the sample in a record. Raises KeyError, ValueError, TypeError, IndexError."""
        counts = _zeros()
        for at, count in cast(Mapping[str, int], record["latency"]).items():
            counts[int(at)] = int(count)
        calls, rows, failed = (int(cast(int, record[name])) for name in ("calls", "rows", "failed"))
        return cls(calls, rows, failed, _view(counts))


def _is_failure(code: str) -> bool:
    return code == Cancelled.code or fault_of(code) != "caller"


def _zeros() -> list[int]:
    return [0] * (len(HISTOGRAMS[LATENCY]) + 1)


def _view(counts: list[int]) -> HistogramView:
    return HistogramView(HISTOGRAMS[LATENCY], counts, 0.0)
