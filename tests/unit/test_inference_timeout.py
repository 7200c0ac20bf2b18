"""The time of one job in the model: its caller is told at the limit, and nobody else notices."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from contracts.held import claim_of, held_of

from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.contract.job import Priority
from millstream.worker.context import Context
from millstream.worker.intake.inference_timeout import InferenceTimeout
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window

LIMITS = {Priority.REALTIME: 0.1, Priority.NORMAL: 0.3, Priority.BATCH: None}


@pytest.fixture
def context() -> Context:
    return Context("worker", Window(Budget(rows=4, tokens=100)))


def look(context: Context, limits: Mapping[Priority, float | None] = LIMITS) -> list[Finished]:
    finished: list[Finished] = []
    InferenceTimeout(context, limits, finished.append).look()
    return finished


def running(context: Context, priority: Priority, seconds: float) -> ActiveJob:
    """A job whose forward began `seconds` ago."""
    held = held_of([3], claim_of(["x"], priority=priority))
    context.window.hold([held])
    context.window.take()
    held.running_since = time.monotonic() - seconds
    return held


def test_a_job_that_is_too_long_in_the_model_ends_with_an_error_that_says_so(context: Context) -> None:
    held = running(context, Priority.NORMAL, 0.31)

    (finished,) = look(context)

    assert finished.address == held.claim.address
    assert isinstance(finished.reply.error, DeadlineExceeded)
    assert finished.reply.error.phase == "inference"
    assert finished.bury == ""


def test_what_the_model_computes_for_an_ended_job_is_dropped(context: Context) -> None:
    context.window.hold([held_of([3])])
    rows = context.window.take()
    held = context.window.jobs_of(rows)[0]
    assert held
    held.running_since = time.monotonic() - 1.0

    look(context)

    assert context.window.complete(rows, ["too late"]) == []


def test_the_limit_is_that_of_the_jobs_priority(context: Context) -> None:
    realtime = running(context, Priority.REALTIME, 0.2)
    running(context, Priority.NORMAL, 0.2)
    running(context, Priority.BATCH, 1_000.0)

    assert [each.address for each in look(context)] == [realtime.claim.address]


def test_all_forwards_over_a_jobs_rows_count(context: Context) -> None:
    held = running(context, Priority.NORMAL, 0.2)
    held.inference_ms = 150.0

    assert len(look(context)) == 1


def test_time_spent_waiting_between_two_forwards_does_not_count(context: Context) -> None:
    held = running(context, Priority.NORMAL, 1_000.0)
    held.inference_ms, held.running_since = 250.0, None

    assert look(context) == []


def test_without_a_limit_nobody_is_ended(context: Context) -> None:
    running(context, Priority.REALTIME, 1_000.0)

    assert look(context, dict.fromkeys(Priority, None)) == []


def test_an_ended_job_is_told_once(context: Context) -> None:
    running(context, Priority.NORMAL, 1.0)

    assert [len(look(context)), len(look(context))] == [1, 0]
