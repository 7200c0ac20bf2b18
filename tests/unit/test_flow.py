"""A call keeps as many jobs in flight as its workers can use, and no more than are answered in their time."""

from __future__ import annotations

from millstream.client.flow import JOBS_PER_WORKER, LEAST_PER_WORKER, Flow


def answers(flow: Flow, count: int, every_s: float) -> None:
    for n in range(1, count + 1):
        flow.answered(n * every_s)


def test_a_worker_that_joins_gets_jobs_at_once() -> None:
    flow = Flow(128, None, 0.0)

    assert [flow.window(live) for live in (1, 2, 4)] == [JOBS_PER_WORKER, 2 * JOBS_PER_WORKER, 4 * JOBS_PER_WORKER]


def test_the_window_is_never_most_of_the_queue() -> None:
    assert Flow(3, None, 0.0).window(10) == 3
    assert Flow(0, None, 0.0).window(10) == 1


def test_slow_forwards_get_a_window_whose_jobs_are_answered_in_half_their_time() -> None:
    flow = Flow(128, 6.0, 0.0)
    answers(flow, 20, 1.0)

    assert flow.window(1) == 3


def test_a_window_keeps_a_job_waiting_behind_the_one_that_runs_however_slow() -> None:
    flow = Flow(128, 6.0, 0.0)
    answers(flow, 5, 30.0)

    assert flow.window(2) == 2 * LEAST_PER_WORKER


def test_fast_answers_do_not_narrow_it() -> None:
    flow = Flow(128, 60.0, 0.0)
    answers(flow, 100, 0.01)

    assert flow.window(2) == 2 * JOBS_PER_WORKER


def test_what_was_long_ago_counts_little() -> None:
    flow = Flow(128, 6.0, 0.0)
    answers(flow, 10, 1.0)
    for n in range(200):
        flow.answered(10.0 + n * 0.1)

    assert flow.window(1) == JOBS_PER_WORKER


def test_a_worker_that_runs_many_jobs_at_once_has_as_many_in_flight_however_slow() -> None:
    flow = Flow(1_000, 6.0, 0.0, at_once=64)

    assert flow.window(2) == 2 * (63 + JOBS_PER_WORKER)
    answers(flow, 5, 30.0)
    assert flow.window(2) == 2 * (63 + LEAST_PER_WORKER)
