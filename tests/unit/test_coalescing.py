"""Of jobs that are alike and under way at the same time one is sent, and each caller gets its answer or its own try."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually

from millstream.broker.contract.codec import encode_inputs, encode_reply
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    Cancelled,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    QueueFull,
    WorkerLost,
)
from millstream.broker.contract.job import Draft, Priority, Reply
from millstream.broker.queue.stream_types import CancelOutcome, Group
from millstream.broker.queue.submission import Submission
from millstream.client.channel.channel import Channel
from millstream.client.channel.coalescing import Coalescer
from millstream.client.channel.requests import Cancellation

ANSWER = encode_reply(Reply(values=["done"]))


class Caller:
    """A sink that notes what it was told, by job id."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, bytes]] = []
        self.deltas: list[tuple[str, bytes]] = []
        self.errors: list[tuple[Sequence[str], MillstreamError]] = []

    def answered(self, job_id: str, reply: bytes) -> None:
        self.answers.append((job_id, reply))

    def emitted(self, job_id: str, delta: bytes) -> None:
        self.deltas.append((job_id, delta))

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.errors.append((job_ids, error))

    @property
    def outcomes(self) -> int:
        return len(self.answers) + len(self.errors)


class Sent:
    """A channel that notes what it is given, and refuses all once `closed`."""

    client_id = "me"

    def __init__(self) -> None:
        self.submissions: list[Submission] = []
        self.cancelled: list[str] = []
        self.closed = False

    def submit(self, submissions: Sequence[Submission]) -> None:
        if self.closed:
            raise BrokerUnavailable("this client is closed")
        self.submissions += submissions

    def cancel(self, cancellation: Cancellation) -> None:
        if self.closed:
            raise BrokerUnavailable("this client is closed")
        self.cancelled += cancellation.job_ids
        cancellation.report(["running"] * len(cancellation.job_ids))


class Bench:
    def __init__(self) -> None:
        self.channel = Sent()
        self.coalescer = Coalescer(cast(Channel, self.channel))

    def call(
        self,
        text: str = "a",
        *,
        service: str = "echo",
        priority: Priority = Priority.NORMAL,
        tenant: str = "",
        options: dict[str, str] | None = None,
        for_s: float | None = 60.0,
        wait: bool = True,
    ) -> tuple[Caller, Submission]:
        caller, body = Caller(), encode_inputs([text], options or {})
        end = None if for_s is None else time.monotonic() + for_s
        draft = Draft(secrets.token_hex(16), "echo", 1, 3, body, "me", end, tenant=tenant)
        submission = Submission(service, Group(priority, [draft]), caller, end if wait else 0.0)
        self.coalescer.submit([submission])
        return caller, submission

    def answer(self, reply: bytes = ANSWER, at: int = 0) -> None:
        submission = self.channel.submissions[at]
        submission.sink.answered(submission.job_ids[0], reply)

    def cancel(self, *submissions: Submission) -> list[CancelOutcome]:
        told: list[CancelOutcome] = []
        job_ids = [job_id for each in submissions for job_id in each.job_ids]
        self.coalescer.cancel(
            Cancellation("echo", job_ids, lambda found: told.extend(cast(list[CancelOutcome], found)))
        )
        return told

    @property
    def sent(self) -> list[str]:
        return [job_id for each in self.channel.submissions for job_id in each.job_ids]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_like_jobs_under_way_are_sent_once_and_each_caller_is_answered_by_its_own_id(bench: Bench) -> None:
    calls = [bench.call() for _ in range(3)]

    bench.answer()

    assert bench.sent == calls[0][1].job_ids
    assert [caller.answers for caller, _ in calls] == [[(job.job_ids[0], ANSWER)] for _, job in calls]


def test_deltas_reach_all_callers_of_a_shared_job_and_one_callers_fault_keeps_them_from_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [bench.call() for _ in range(3)]
    monkeypatch.setattr(calls[0][0], "emitted", None)

    submission = bench.channel.submissions[0]
    submission.sink.emitted(submission.job_ids[0], b"0 a")

    assert [caller.deltas for caller, _ in calls] == [[], *[[(job.job_ids[0], b"0 a")] for _, job in calls[1:]]]


def test_after_the_answer_a_like_job_is_sent_again(bench: Bench) -> None:
    bench.call()
    bench.answer()

    _, later = bench.call()

    assert bench.sent[1:] == later.job_ids


@pytest.mark.parametrize(
    "other",
    [
        {"text": "b"},
        {"service": "other"},
        {"priority": Priority.REALTIME},
        {"tenant": "other"},
        {"options": {"truncate": "end"}},
    ],
)
def test_jobs_that_differ_are_all_sent(bench: Bench, other: dict[str, object]) -> None:
    bench.call()

    bench.call(**other)  # type: ignore[arg-type]

    assert len(bench.sent) == 2


def failed(error: MillstreamError, *, whole: bool) -> bytes:
    """The reply of a job that failed as a whole, or of one whose only row failed."""
    return encode_reply(Reply(error=error) if whole else Reply(values=[], errors={0: error}))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("error", [DeadlineExceeded, WorkerLost, Cancelled, MillstreamError])
def test_a_failure_that_may_be_the_sent_jobs_own_sends_all_others_at_once(
    bench: Bench, error: type[MillstreamError], whole: bool
) -> None:
    leader, _ = bench.call()
    others = [bench.call() for _ in range(3)]

    bench.answer(failed(error("not now"), whole=whole))

    assert bench.sent[1:] == [job_id for _, job in others for job_id in job.job_ids]
    assert [len(each.answers) for each in (leader, *(caller for caller, _ in others))] == [1, 0, 0, 0]
    bench.answer(at=2)
    assert [len(caller.answers) for caller, _ in others] == [0, 1, 0]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("error", [InvalidRequest, InputTooLong, ModelFailed])
def test_an_error_of_the_input_is_shared(bench: Bench, error: type[MillstreamError], whole: bool) -> None:
    calls = [bench.call() for _ in range(3)]
    reply = failed(error("bad"), whole=whole)

    bench.answer(reply)

    assert [caller.answers for caller, _ in calls] == [[(job.job_ids[0], reply)] for _, job in calls]
    assert len(bench.sent) == 1


@pytest.mark.parametrize("head", [b'{"v":1,"by":"new","error":', b'{"error":'])
def test_a_failure_is_known_wherever_its_reply_says_so(bench: Bench, head: bytes) -> None:
    bench.call()
    _, other = bench.call()

    bench.answer(head + b'{"code":"worker_lost","message":"","hint":""}}\n')

    assert bench.sent[1:] == other.job_ids


def test_an_answer_that_speaks_of_errors_is_an_answer(bench: Bench) -> None:
    calls = [bench.call() for _ in range(2)]
    reply = encode_reply(Reply(values=[{"error": {"code": "worker_lost"}}]))

    bench.answer(reply)

    assert [caller.answers for caller, _ in calls] == [[(job.job_ids[0], reply)] for _, job in calls]


def test_a_caller_that_raises_costs_the_others_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    broken, _ = bench.call()
    broken.answers = cast(list[tuple[str, bytes]], None)
    other, _ = bench.call()

    bench.answer()

    assert len(other.answers) == 1
    assert "could not be handed over" in caplog.text


def test_a_refusal_is_not_shared_and_all_others_are_sent_at_once(bench: Bench) -> None:
    leader, submission = bench.call()
    _, second = bench.call()
    _, third = bench.call()

    bench.channel.submissions[0].sink.refused(submission.job_ids, QueueFull("full"))

    assert len(leader.errors) == 1
    assert bench.sent[1:] == second.job_ids + third.job_ids


def test_a_sent_job_that_its_caller_cancels_goes_on_for_the_others(bench: Bench) -> None:
    first, leader = bench.call()
    others = [bench.call() for _ in range(2)]

    assert bench.cancel(leader) == ["running"]
    late, _ = bench.call()

    assert (bench.channel.cancelled, bench.sent) == ([], leader.job_ids)
    bench.answer()
    assert [len(each.answers) for each in (first, late, *(caller for caller, _ in others))] == [0, 1, 1, 1]


def test_the_last_one_who_leaves_a_job_cancels_it_on_the_server(bench: Bench) -> None:
    _, leader = bench.call()
    _, second = bench.call()
    _, third = bench.call()

    assert bench.cancel(leader) == ["running"]
    assert bench.cancel(second) == ["waiting"]
    assert bench.channel.cancelled == []
    assert bench.cancel(third) == ["running"]

    assert (bench.channel.cancelled, bench.sent) == (leader.job_ids, leader.job_ids)


def test_a_failure_of_a_job_whose_caller_left_it_sends_all_others_at_once(bench: Bench) -> None:
    first, leader = bench.call()
    _, second = bench.call()
    _, third = bench.call()
    bench.cancel(leader)

    bench.answer(encode_reply(Reply(error=DeadlineExceeded("late"))))

    assert first.answers == []
    assert bench.sent[1:] == second.job_ids + third.job_ids


def test_a_sent_job_whose_time_is_over_is_cancelled_and_all_others_are_sent(bench: Bench) -> None:
    _, leader = bench.call(for_s=0.5)
    _, second = bench.call()
    _, third = bench.call()
    eventually(lambda: time.monotonic() > (leader.until or 0.0))

    assert bench.cancel(leader) == ["running"]

    assert bench.channel.cancelled == leader.job_ids
    assert bench.sent[1:] == second.job_ids + third.job_ids


def test_a_job_whose_caller_left_it_is_waited_for_no_longer_than_its_own_time(bench: Bench) -> None:
    _, leader = bench.call(for_s=0.2)
    second, job = bench.call(for_s=60.0)
    bench.cancel(leader)
    assert bench.channel.cancelled == []

    eventually(lambda: bench.channel.cancelled == leader.job_ids)

    assert bench.sent == leader.job_ids + job.job_ids
    bench.answer(at=1)
    assert len(second.answers) == 1


def test_one_that_was_not_sent_is_cancelled_without_the_server_and_the_sent_one_goes_on(bench: Bench) -> None:
    first, _ = bench.call()
    second, job = bench.call()
    _, other = bench.call("b")

    assert bench.cancel(job) == ["waiting"]
    assert bench.channel.cancelled == []
    assert bench.cancel(job, other) == ["running", "running"]

    bench.answer()
    assert (len(first.answers), len(second.answers)) == (1, 0)


def test_who_does_not_wait_for_room_follows_nobody_and_leads_nobody(bench: Bench) -> None:
    bench.call()

    bench.call(wait=False)
    bench.call("b", wait=False)
    bench.call("b")

    assert len(bench.sent) == 4


def test_who_followed_a_job_that_is_given_up_as_the_client_closes_is_told(bench: Bench) -> None:
    _, first = bench.call(for_s=0.01)
    second, _ = bench.call()
    eventually(lambda: time.monotonic() > (first.until or 0.0))
    bench.channel.closed = True

    with pytest.raises(BrokerUnavailable):
        bench.cancel(first)

    eventually(lambda: second.errors)


def test_nobody_follows_a_job_whose_time_is_over(bench: Bench) -> None:
    bench.call(for_s=0.0)

    bench.call()

    assert len(bench.sent) == 2


def test_who_followed_when_the_client_is_closed_is_told(bench: Bench) -> None:
    _, first = bench.call()
    second, _ = bench.call()
    bench.channel.closed = True

    bench.channel.submissions[0].sink.refused(first.job_ids, BrokerUnavailable("closed"))

    eventually(lambda: second.errors)
    with pytest.raises(BrokerUnavailable):
        bench.call()


def test_nothing_is_kept_of_what_is_over(bench: Bench) -> None:
    for _ in range(3):
        bench.call()
    bench.answer()
    _, first = bench.call()
    _, second = bench.call()
    bench.cancel(first, second)

    coalescer = bench.coalescer
    assert (coalescer._jobs, coalescer._by_leader, coalescer._by_follower, coalescer._leaderless) == ({}, {}, {}, set())


DEEDS = ("call", "call", "call", "cancel", "answer", "fail", "fail alike", "refuse")
REPLIES = {
    "answer": ANSWER,
    "fail": failed(WorkerLost("died"), whole=True),
    "fail alike": failed(ModelFailed("NaN"), whole=True),
}


class World(Bench):
    """Any number of callers, whose sent jobs end in any order and way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Caller, Submission]] = []
        self.gone: set[str] = set()
        self._over: set[int] = set()

    def do(self, deed: str, text: str, number: int) -> None:
        if deed == "call":
            self.calls.append(self.call(text))
        elif deed == "cancel" and (waiting := [job for caller, job in self._staying() if not caller.outcomes]):
            job = waiting[number % len(waiting)]
            self.gone.add(job.job_ids[0])
            assert len(self.cancel(job)) == 1
        elif deed != "cancel" and (jobs := self.open_jobs()):
            self.end(jobs[number % len(jobs)], deed)

    def end(self, at: int, deed: str) -> None:
        self._over.add(at)
        submission = self.channel.submissions[at]
        if deed == "refuse":
            submission.sink.refused(submission.job_ids, QueueFull("full"))
        else:
            self.answer(REPLIES[deed], at)

    def open_jobs(self) -> list[int]:
        """The places of jobs that the server has and nobody cancelled."""
        ended = self.channel.cancelled
        return [at for at, job_id in enumerate(self.sent) if at not in self._over and job_id not in ended]

    def outcomes(self, *, gone: bool) -> list[int]:
        """How many outcomes each caller had: of those that cancelled, or of the others."""
        return [caller.outcomes for caller, job in self.calls if (job.job_ids[0] in self.gone) == gone]

    def _staying(self) -> list[tuple[Caller, Submission]]:
        return [(caller, job) for caller, job in self.calls if job.job_ids[0] not in self.gone]


@given(st.lists(st.tuples(st.sampled_from(DEEDS), st.sampled_from("ab"), st.integers(0, 1_000)), max_size=40))
def test_whatever_happens_each_caller_that_stays_has_one_outcome_and_nothing_runs_for_nobody(
    deeds: list[tuple[str, str, int]],
) -> None:
    world = World()

    for deed in deeds:
        world.do(*deed)
        assert world.open_jobs() or 0 not in world.outcomes(gone=False)
        assert 0 in world.outcomes(gone=False) or not world.open_jobs()
    while jobs := world.open_jobs():
        world.end(jobs[0], "answer")

    assert set(world.outcomes(gone=False)) <= {1}
    assert set(world.outcomes(gone=True)) <= {0}
    coalescer = world.coalescer
    assert (coalescer._jobs, coalescer._by_leader, coalescer._by_follower, coalescer._leaderless) == ({}, {}, {}, set())
