"""Rates and latencies between two looks at services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from views import WORKER, view

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.metrics import ServiceMetrics, decode_metrics
from millstream.broker.queue.pace import WINDOW_S, Look, Pace, Paces, measure_paces, merge
from millstream.broker.queue.views import WorkerView


def totals(**counts: int) -> ServiceMetrics:
    """The totals of the service docs. A double underscore is a colon, another pair of them a point."""
    fields: Mapping[bytes, bytes] = {
        name.replace("__", ":").encode(): str(count).encode() for name, count in counts.items()
    }
    return decode_metrics(ServiceKeys("docs"), fields)


def look(at: float, *workers: WorkerView, **counts: int) -> Look:
    return Look(at, [view("docs", workers=list(workers))], [totals(**counts)])


def pace(before: Look, after: Look) -> Pace:
    return measure_paces(before, after)["docs"]


def test_rates_are_differences_by_the_time_between_the_looks() -> None:
    before = look(10.0, jobs__batch=5, settled=100, work__rows=50, work__forwards=10, refused__queue_full=1)
    after = look(12.0, jobs__batch=25, settled=106, work__rows=90, work__forwards=20, refused__queue_full=4)

    found = pace(before, after)

    assert found.window_s == 2.0
    assert found.accepted_per_s == {Priority.REALTIME: 0.0, Priority.NORMAL: 0.0, Priority.BATCH: 10.0}
    assert (found.settled_per_s, found.rows_per_s, found.rows_per_forward) == (3.0, 20.0, 4.0)
    assert found.refused_per_s == 1.5


def test_totals_that_began_again_are_no_negative_rate() -> None:
    found = pace(look(0.0, settled=100, work__rows=9, work__forwards=9), look(1.0, settled=3))

    assert (found.settled_per_s, found.rows_per_s, found.rows_per_forward) == (0.0, 0.0, None)


def test_latencies_are_those_of_the_jobs_that_ended_meanwhile() -> None:
    before = look(0.0, total__normal__100=50, total__normal__sum=1)
    after = look(1.0, total__normal__100=50, total__normal__10=4, total__normal__sum=2)

    found = pace(before, after).total[Priority.NORMAL]

    assert (found.count, found.quantile(1.0)) == (4, 10.0)


def test_merged_latencies_count_those_of_all_priorities() -> None:
    found = pace(look(0.0), look(1.0, total__normal__10=1, total__batch__100=3)).total

    assert merge(found.values()).count == 4
    assert merge(found.values()).quantile(1.0) == 100.0


def test_a_worker_is_measured_by_its_own_clock_and_only_if_it_was_there_before() -> None:
    one = replace(WORKER, rows=10, busy_ms=100, age_ms=1_000)
    later, new = replace(one, rows=30, busy_ms=900, age_ms=2_000), replace(WORKER, consumer="new", age_ms=50)

    found = pace(look(0.0, one), look(9.0, later, new)).workers

    assert {name: (each.rows_per_s, each.busy) for name, each in found.items()} == {WORKER.consumer: (20.0, 0.8)}


def test_a_service_that_is_new_and_a_lone_look_have_no_pace() -> None:
    first = look(1.0)

    assert measure_paces(first, first) == {}
    assert measure_paces(Look(0.0, [], []), first) == {}


def test_a_window_is_as_long_as_its_oldest_look_allows_and_begins_again_when_told() -> None:
    paces = Paces()

    found = [paces.add(look(float(at))) for at in range(25)]

    windows = [each["docs"].window_s for each in found[1:]]
    assert found[0] == {}
    assert windows[:3] == [1.0, 2.0, 3.0]
    assert windows[-1] == pytest.approx(WINDOW_S)
    paces.forget()
    assert paces.add(look(99.0)) == {}
