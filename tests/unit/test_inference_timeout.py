"""The time of one job in the model: its caller is told at the limit, and nobody else notices."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from contracts.held import claim_of, held_of

from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.contract.job import Priority
from millstream.worker.context import Shared
from millstream.worker.intake.inference_timeout import Timekeeper
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import Held
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window

LIMITS = {Priority.REALTIME: 0.1, Priority.NORMAL: 0.3, Priority.BATCH: None}


@pytest.fixture
def shared() -> Shared:
    return Shared("worker", Window(Budget(rows=4, tokens=100)))


def look(shared: Shared, limits: Mapping[Priority, float | None] = LIMITS) -> list[Finished]:
    finished: list[Finished] = []
    Timekeeper(shared, limits, finished.append).look()
    return finished


def running(shared: Shared, priority: Priority, seconds: float) -> Held:
    """A job whose forward began `seconds` ago."""
    held = held_of([3], claim_of(["x"], priority=priority))
    shared.window.hold([held])
    shared.window.take()
    held.running_since = time.monotonic() - seconds
    return held


def test_a_job_that_is_too_long_in_the_model_ends_with_an_error_that_says_so(shared: Shared) -> None:
    held = running(shared, Priority.NORMAL, 0.31)

    (finished,) = look(shared)

    assert finished.address == held.claim.address
    assert isinstance(finished.reply.error, DeadlineExceeded)
    assert finished.reply.error.phase == "inference"
    assert finished.bury == ""


def test_what_the_model_computes_for_an_ended_job_is_dropped(shared: Shared) -> None:
    shared.window.hold([held_of([3])])
    rows = shared.window.take()
    held = shared.window.jobs_of(rows)[0]
    assert held
    held.running_since = time.monotonic() - 1.0

    look(shared)

    assert shared.window.complete(rows, ["too late"]) == []


def test_the_limit_is_that_of_the_jobs_priority(shared: Shared) -> None:
    realtime = running(shared, Priority.REALTIME, 0.2)
    running(shared, Priority.NORMAL, 0.2)
    running(shared, Priority.BATCH, 1_000.0)

    assert [each.address for each in look(shared)] == [realtime.claim.address]


def test_all_forwards_over_a_jobs_rows_count(shared: Shared) -> None:
    held = running(shared, Priority.NORMAL, 0.2)
    held.inference_ms = 150.0

    assert len(look(shared)) == 1


def test_time_spent_waiting_between_two_forwards_does_not_count(shared: Shared) -> None:
    held = running(shared, Priority.NORMAL, 1_000.0)
    held.inference_ms, held.running_since = 250.0, None

    assert look(shared) == []


def test_without_a_limit_nobody_is_ended(shared: Shared) -> None:
    running(shared, Priority.REALTIME, 1_000.0)

    assert look(shared, dict.fromkeys(Priority, None)) == []


def test_an_ended_job_is_told_once(shared: Shared) -> None:
    running(shared, Priority.NORMAL, 1.0)

    assert [len(look(shared)), len(look(shared))] == [1, 0]
