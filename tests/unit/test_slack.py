"""How long jobs may still wait: by deadline or target, less the work that is predicted."""

from __future__ import annotations

import pytest
from contracts.held import NOW, claim_of, held_of

from millstream.broker.contract.job import Priority
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.slack import (
    NO_WORK_S,
    TARGETS_S,
    Due,
    due_at,
    slack_in_order,
    slack_together,
    targets,
)
from millstream.worker.window import Window


def test_a_job_is_due_at_its_target_or_at_its_deadline_if_that_is_earlier() -> None:
    free, early, late = (claim_of(deadline=deadline).job for deadline in (0, NOW + 500, NOW + 60_000))
    assert free
    assert early
    assert late

    assert due_at(free, 2.0) == due_at(late, 2.0) == NOW + 2_000
    assert due_at(early, 2.0) == NOW + 500


def test_the_target_of_a_service_holds_for_all_but_batch_jobs() -> None:
    assert targets(None) == TARGETS_S
    assert targets(0.3) == {**TARGETS_S, Priority.REALTIME: 0.3, Priority.NORMAL: 0.3}


def test_jobs_that_run_in_order_wait_for_those_that_are_due_before() -> None:
    assert slack_in_order([]) == slack_together([]) == NO_WORK_S
    assert slack_in_order([Due(5.0, 1.0)], forward_s=0.5) == 3.5
    # The first has 4 s left after its work; the second starts after it, and has 1 s left.
    assert slack_in_order([Due(6.0, 4.0), Due(5.0, 1.0)]) == 1.0
    assert slack_together([Due(6.0, 4.0), Due(5.0, 1.0)]) == 2.0


def window_of(*tokens: int, priority: Priority = Priority.NORMAL) -> Window:
    window = Window(Budget(rows=8, tokens=1_000))
    window.targets = TARGETS_S
    window.hold([held_of([each], claim_of(priority=priority)) for each in tokens])
    return window


def test_the_slack_of_a_lane_follows_the_measured_time_of_its_forwards() -> None:
    window = window_of(100, 100)
    assert window.slack_s(NOW) == 5.0
    assert window.slack_s(NOW + 2_000) == 3.0

    window.cost.calibrate(0.01, overhead=0.0, smallest_s=0.1)

    assert window.slack_s(NOW) == pytest.approx(3.0)
    slow = 100
    for _ in range(20):
        window.cost.observe(slow, 3 * 0.01 * slow)
    assert window.slack_s(NOW) == pytest.approx(-1.0, abs=0.1)


def test_the_slack_of_texts_in_slots_follows_the_measured_time_of_a_job() -> None:
    window = window_of(100, 100, priority=Priority.REALTIME)
    window.use_slots(Budget(rows=4, tokens=1_000))
    assert window.slack_s(NOW) == 1.0

    window.cost.observe_job(0.4)
    assert window.slack_s(NOW) == pytest.approx(0.6)
    for _ in range(30):
        window.cost.observe_job(1.2)

    assert window.slack_s(NOW) == pytest.approx(-0.2, abs=0.01)


def test_a_lane_without_jobs_may_wait_for_ever() -> None:
    assert window_of().slack_s(NOW) == NO_WORK_S
