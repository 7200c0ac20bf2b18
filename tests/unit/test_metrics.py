"""What is read of a service's totals, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.metrics import HISTOGRAMS, TIMES_MS, Histogram, bucket_fields, sum_field
from millstream.broker.queue.metrics import HistogramView, ServiceMetrics, backlog_s, decode_metrics
from millstream.broker.queue.views import ServiceView, WorkerView

KEYS = ServiceKeys("docs")


def decoded(**fields: int) -> ServiceMetrics:
    return decode_metrics(KEYS, {name.replace("__", ":").encode(): b"%d" % value for name, value in fields.items()})


def view(*values: float) -> HistogramView:
    observed = Histogram.empty(TIMES_MS).plus(np.array(values, np.float64))
    return HistogramView(TIMES_MS, observed.counts.tolist(), observed.total)


def service(waiting: int, *workers: tuple[int, int]) -> ServiceView:
    """Workers as (jobs, ms in forwards)."""
    views = [
        WorkerView("w", "ready", "", 1, "", "", 0, 1, 0, 0, "", jobs, 0, 0, 0, 0, 0, 0, busy_ms, 0, 0, 0, {})
        for jobs, busy_ms in workers
    ]
    counts = dict.fromkeys(PRIORITIES, 0) | {PRIORITIES[1]: waiting}
    return ServiceView("docs", counts, {}, 0, None, views, 0, None, {})


def test_a_service_without_traffic_has_zeros() -> None:
    totals = decoded()

    assert (totals.settled, totals.ok, totals.cached, totals.failed, totals.refused) == (0, 0, 0, {}, {})
    assert totals.rows_per_batch is None
    assert totals.wait(PRIORITIES[0]).quantile(0.5) is None


def test_labels_are_read_and_what_newer_versions_write_is_ignored() -> None:
    totals = decoded(failed__model_failed=3, failed__cancelled=1, work__forwards=2, work__rows=9, later=7)

    assert totals.failed == {"cancelled": 1, "model_failed": 3}
    assert totals.rows_per_batch == 4.5


def test_values_that_are_no_numbers_count_as_zero() -> None:
    fields = {b"ok": b"many", b"settled": b"-5", b"cached": b"9" * 30, b"\xff": b"1"}

    totals = decode_metrics(KEYS, fields)

    assert (totals.ok, totals.settled, totals.cached) == (0, 0, 0)


def test_every_field_has_one_meaning() -> None:
    fields = [field for name in HISTOGRAMS for field in (*bucket_fields(name), sum_field(name))]

    assert len(set(fields)) == len(fields)
    assert all(list(bounds) == sorted(set(bounds)) for bounds in HISTOGRAMS.values())


def test_a_value_is_in_the_first_bucket_that_it_does_not_exceed() -> None:
    observed = Histogram.empty((1.0, 2.5)).plus(np.array([0.0, 1.0, 1.1])).plus(np.array([2.5, 2.6]))

    assert observed.counts.tolist() == [2, 2, 1]
    assert observed.total == pytest.approx(7.2)


@given(st.lists(st.floats(0.0, 300_000.0), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_is_in_the_bucket_of_the_value_that_it_estimates(values: list[float], share: float) -> None:
    observed = view(*values)
    rank = max(1, min(len(values), -int(-share * len(values) // 1)))
    exact = sorted(values)[rank - 1]
    at = next(at for at, bound in enumerate(TIMES_MS) if exact <= bound)

    found = observed.quantile(share)

    assert found is not None
    assert (0.0, *TIMES_MS)[at] <= found <= TIMES_MS[at]


def test_a_quantile_beyond_the_last_bucket_is_its_bound() -> None:
    assert view(1e9, 1e9).quantile(0.5) == TIMES_MS[-1]


def test_the_values_since_an_earlier_reading_are_known_and_all_of_them_after_a_new_begin() -> None:
    before, after = view(3.0, 70.0), view(3.0, 70.0, 70.0, 200.0)

    assert after.since(before) == view(70.0, 200.0)
    assert before.since(after) == before


@pytest.mark.parametrize(
    ("seen", "seconds"),
    [
        (service(0), 0.0),
        (service(100, (50, 5_000)), 10.0),
        (service(100, (50, 5_000), (50, 5_000)), 5.0),
        (service(100, (0, 0)), 2.0),
        (service(100), 2.0),
    ],
)
def test_the_backlog_is_what_live_workers_need_for_it_as_fast_as_they_were(seen: ServiceView, seconds: float) -> None:
    assert backlog_s(seen, decoded(settled=500, work__busy_ms=10_000)) == pytest.approx(seconds)


def test_the_backlog_of_a_service_that_never_ran_is_unknown() -> None:
    assert backlog_s(service(100, (0, 0)), decoded()) is None
