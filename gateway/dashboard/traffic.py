"""Rates, latencies and the backlog of a service, as its page and the charts show them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.metrics import ServiceMetrics, backlog_s
from millstream.broker.queue.pace import Pace, merge
from millstream.broker.queue.views import ServiceView
from millstream.gateway.dashboard.history import Sample

SERIES = ("waiting", "in_flight", "rows_per_s", "p50_ms", "p95_ms")
"""Names of the figures of a sample, for the charts."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of a service in the last seconds: of its answered jobs the rates, and the times from acceptance, ms.

    `backlog_s`: seconds until the waiting jobs would be answered. What is not known is None.
    """

    backlog_s: float | None = None
    jobs_per_s: float | None = None
    rows_per_s: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None


def measure_traffic(view: ServiceView, totals: ServiceMetrics, pace: Pace | None) -> Traffic:
    """Returns the traffic within the window of `pace`; only the backlog if there was no earlier look."""
    backlog = backlog_s(view, totals)
    if pace is None:
        return Traffic(backlog)
    total = merge(pace.total[each] for each in PRIORITIES)
    return Traffic(backlog, pace.settled_per_s, pace.rows_per_s, total.quantile(0.5), total.quantile(0.95))


def sample(view: ServiceView, traffic: Traffic) -> Sample:
    """Returns the figures of a service for the charts."""
    return {
        "waiting": view.depth,
        "in_flight": view.in_flight,
        "rows_per_s": traffic.rows_per_s,
        "p50_ms": traffic.p50_ms,
        "p95_ms": traffic.p95_ms,
    }
