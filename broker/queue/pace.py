"""Rates and latencies of services between two looks at them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.metrics import HistogramView, ServiceMetrics
from millstream.broker.queue.views import ServiceView, WorkerView

WINDOW_S = 10.0
"""Seconds over which rates and latencies are taken: shorter than a glance they jump, longer they hide a change."""


@dataclass(frozen=True, slots=True)
class Look:
    """Views and totals of the same services, read at `at`, monotonic seconds."""

    at: float
    views: Sequence[ServiceView]
    totals: Sequence[ServiceMetrics]


@dataclass(frozen=True, slots=True)
class WorkerPace:
    """Rows per second of a worker, and the share of the time in which a forward ran, 0 to 1."""

    rows_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Pace:
    """Rates and latencies of a service within `window_s` seconds.

    Jobs per second: `accepted_per_s` by priority, `settled_per_s`. `rows_per_s` and `rows_per_forward` of its workers'
    forwards, None if there was none. `wait` and `total` are the latencies of the jobs that ended, by priority, ms.
    `workers` has those that lived at both looks.
    """

    window_s: float
    accepted_per_s: Mapping[Priority, float]
    settled_per_s: float
    refused_per_s: float
    rows_per_s: float
    rows_per_forward: float | None
    wait: Mapping[Priority, HistogramView]
    total: Mapping[Priority, HistogramView]
    workers: Mapping[str, WorkerPace]


class Paces:
    """The looks of the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque()

    def add(self, look: Look) -> Mapping[str, Pace]:
        """Adds the newest look. Returns the pace of each service since the oldest look of the window that has it."""
        self._looks.append(look)
        while len(self._looks) > 2 and look.at - self._looks[1].at >= WINDOW_S:
            self._looks.popleft()
        return measure_paces(self._looks[0], look)

    def forget(self) -> None:
        """Begins again, after a time in which the server could not be read."""
        self._looks.clear()


def measure_paces(before: Look, after: Look) -> Mapping[str, Pace]:
    """Returns the pace of each service that both looks have; none if they are the same look."""
    window_s = after.at - before.at
    if window_s <= 0:
        return {}
    earlier = {view.name: (view, totals) for view, totals in zip(before.views, before.totals, strict=True)}
    return {
        view.name: _pace(window_s, *earlier[view.name], view, totals)
        for view, totals in zip(after.views, after.totals, strict=True)
        if view.name in earlier
    }


def _pace(
    window_s: float, view: ServiceView, totals: ServiceMetrics, view_now: ServiceView, totals_now: ServiceMetrics
) -> Pace:
    def rate(before: int, now: int) -> float:
        # Totals that began again are smaller than before.
        return max(0, now - before) / window_s

    work, work_now = totals.work, totals_now.work
    rows, forwards = (max(0, work_now[name] - work[name]) for name in ("rows", "forwards"))
    return Pace(
        window_s=window_s,
        accepted_per_s={each: rate(totals.jobs[each], totals_now.jobs[each]) for each in PRIORITIES},
        settled_per_s=rate(totals.settled, totals_now.settled),
        refused_per_s=rate(sum(totals.refused.values()), sum(totals_now.refused.values())),
        rows_per_s=rows / window_s,
        rows_per_forward=rows / forwards if forwards else None,
        wait={each: totals_now.wait(each).since(totals.wait(each)) for each in PRIORITIES},
        total={each: totals_now.total(each).since(totals.total(each)) for each in PRIORITIES},
        workers=_workers(view.workers, view_now.workers),
    )


def _workers(before: Iterable[WorkerView], after: Iterable[WorkerView]) -> Mapping[str, WorkerPace]:
    """Returns the pace of each worker by its own clock: between two heartbeats its figures do not change."""
    earlier = {worker.consumer: worker for worker in before}
    paces = {}
    for worker in after:
        was = earlier.get(worker.consumer)
        span_ms = worker.age_ms - was.age_ms if was else 0
        if was and span_ms > 0:
            busy = min(1.0, max(0, worker.busy_ms - was.busy_ms) / span_ms)
            paces[worker.consumer] = WorkerPace(max(0, worker.rows - was.rows) * 1000 / span_ms, busy)
    return paces


def merge(histograms: Iterable[HistogramView]) -> HistogramView:
    """Returns one histogram of all values. The histograms have equal bounds; there is at least one."""
    found = list(histograms)
    counts = [sum(column) for column in zip(*(each.counts for each in found), strict=True)]
    return HistogramView(found[0].bounds, counts, sum(each.total for each in found))
