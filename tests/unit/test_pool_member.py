"""One service of a pool: how long its jobs in the queue may wait, and when a failed load is tried again."""

from __future__ import annotations

import pytest
from workers import spec

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.look import Look, Waiting
from millstream.worker.pool.member import Member
from millstream.worker.scheduling.slack import NO_WORK_S

NOW = 1_000_000


def tenant_of(paused: bool = False, **waiting: Waiting) -> Member:
    """A member with these jobs in its queue, by priority."""
    member = Member(spec("docs", target=2.0))
    streams = {each: waiting.get(each.value, Waiting(0, 0, 0)) for each in PRIORITIES}
    member.look = Look(NOW, paused, streams)
    return member


def test_without_jobs_it_may_wait_for_ever() -> None:
    assert not Member(spec("docs")).standing(0.0).has_jobs
    assert tenant_of().standing(0.0).slack_s == NO_WORK_S
    assert not tenant_of(paused=True, normal=Waiting(3, NOW, 0)).standing(0.0).has_jobs


def test_the_oldest_job_is_due_at_its_target_or_deadline_less_the_load_and_its_work() -> None:
    member = tenant_of(normal=Waiting(1, NOW - 500, 0))
    assert member.standing(0.0).slack_s == 1.5

    member.load_s, member.job_s = 0.75, 0.25

    assert member.standing(0.0).slack_s == 0.5
    member.look = tenant_of(normal=Waiting(1, NOW - 500, NOW + 250)).look
    assert member.standing(0.0).slack_s == -0.75


def test_the_last_job_waits_for_all_before_it() -> None:
    member = tenant_of(normal=Waiting(30, NOW, 0))
    member.job_s = 0.1

    assert member.standing(0.0).slack_s == pytest.approx(-1.0)


def test_its_class_is_that_of_its_most_urgent_job() -> None:
    both = tenant_of(normal=Waiting(1, NOW, 0), batch=Waiting(5, NOW - 90_000, 0))

    assert PRIORITIES[both.standing(0.0).rank] == Priority.NORMAL
    assert both.standing(0.0).slack_s == -30.0


def test_a_load_that_failed_is_tried_again_later_each_time() -> None:
    member, waits = tenant_of(normal=Waiting(1, NOW, 0)), []
    for _ in range(8):
        member.note_failed("broken", 100.0)
        waits.append(member.retry_at - 100.0)
        assert member.standing(100.0).blocked
        assert not member.standing(member.retry_at).blocked

    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    member.note_loaded(2.0, 200.0)
    assert (member.state, member.why, member.loads, member.load_s) == ("ready", "", 1, 2.0)
    assert not member.standing(200.0).blocked


def test_an_entry_that_nobody_can_read_counts_as_if_it_had_just_come() -> None:
    assert tenant_of(normal=Waiting(1, 0, 0)).standing(0.0).slack_s == 2.0
