"""A call falls back as a whole, once, for what another version may not have; its caller gets rows of one version."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import pytest

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.spec import ModelSpec, Runtime
from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    NoWorkers,
    QueueFull,
    RateLimited,
    ServicePaused,
    WorkerLost,
)
from millstream.broker.contract.job import Json, Priority, Reply
from millstream.broker.contract.partial import Delta, encode_delta
from millstream.broker.queue.submission import Submission
from millstream.client.attempt import Attempt
from millstream.client.channel.requests import Cancellation
from millstream.client.fall_back import falls_back
from millstream.client.growing_text import GrowingText
from millstream.client.handle import Handle
from millstream.client.job_terms import JobTerms
from millstream.client.known import Known
from millstream.client.result import Values
from millstream.client.split import split
from millstream.client.transfer import WATCH_S, Transfer

ROWS: list[Json] = ["a", "b", "c", "d"]
SPEC = ServiceSpec(name="echo", model=ModelSpec(type="echo"), model_ref="echo", runtime=Runtime())


class Channel:
    """Keeps what it is given."""

    client_id = "c"

    def __init__(self) -> None:
        self.sent: list[Submission] = []
        self.cancelled: list[str] = []

    def submit(self, submissions: Sequence[Submission]) -> None:
        self.sent += submissions

    def cancel(self, cancellation: Cancellation) -> None:
        self.cancelled += cancellation.job_ids

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        return None

    def jobs(self, service: str) -> list[str]:
        return [draft.id for each in self.sent if each.service == service for draft in each.group.drafts]


class Watch:
    """A service with as many live workers as it says."""

    def __init__(self) -> None:
        self.live_workers = 1

    def live(self, service: str, changed: object) -> int:
        return 4

    def explain(self, service: str, tell: object) -> None:
        tell(self.last_known(service))  # type: ignore[operator]

    def last_known(self, service: str) -> Known:
        return Known(SPEC, "", self.live_workers, False, time.monotonic())


class Call:
    """A call of four rows, in jobs of two, to v2, with v1 as its fallback."""

    def __init__(
        self, timeout: float | None = None, wait: bool = True, op: str = "echo", growing: GrowingText | None = None
    ) -> None:
        self.channel, self.watch = Channel(), Watch()
        rows = ROWS if op == "echo" else ROWS[:1]
        parts = split(dict.fromkeys(range(len(rows)), 1), 2, 100)

        def terms(version: str) -> JobTerms:
            return JobTerms(f"s@{version}", op, Priority.NORMAL, {}, timeout, 60.0, None, wait, 8, version=version)

        self.transfer = Transfer(
            self.channel,
            self.watch,
            terms("v2"),
            rows,
            parts,
            {},
            growing=growing,
            fallback=lambda _: Attempt(self.channel, terms("v1"), parts, {}),
        )
        self.handle = Handle(self.transfer)

    def answer(self, job_id: str, reply: Reply) -> None:
        self.transfer.answered(job_id, encode_reply(reply))

    def finish(self) -> None:
        for job_id in self.channel.jobs("s@v1"):
            self.answer(job_id, Reply(values=["v1", "v1"]))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(error=ModelFailed("broken")),
        Reply(error=DeadlineExceeded("late", phase="inference")),
        Reply(error=WorkerLost("died")),
        Reply(values=["v2"], errors={1: ModelFailed("broken")}),
    ],
)
def test_the_whole_call_starts_again_and_results_of_the_first_version_are_thrown_away(reply: Reply) -> None:
    call = Call()
    first, second = call.channel.jobs("s@v2")

    call.answer(first, Reply(values=["v2", "v2"]))
    call.answer(second, reply)
    call.answer(second, Reply(values=["v2", "v2"]))
    begun_again = call.channel.jobs("s@v1")
    call.answer(begun_again[1], Reply(values=["v1", "v1"]))
    assert not call.handle.ready
    call.answer(begun_again[0], Reply(values=["v1", "v1"]))

    result = call.handle.result(0)
    assert list(result) == ["v1"] * 4
    assert cast(Values, result).version == call.handle.version == "v1"
    assert call.handle.service == "s@v1"


@pytest.mark.parametrize("error", [QueueFull("full"), ServicePaused("paused")])
def test_a_refusal_is_a_reason_too_at_once(error: MillstreamError) -> None:
    call = Call()
    assert [each.until for each in call.channel.sent] == [0.0]

    call.transfer.refused(call.channel.jobs("s@v2"), error)
    call.finish()

    assert list(call.handle.result(0)) == ["v1"] * 4
    # The fallback itself waits for room, as its caller does.
    assert {each.until for each in call.channel.sent if each.service == "s@v1"} != {0.0}


def test_a_rate_limit_is_waited_for_and_no_reason() -> None:
    call = Call()

    call.transfer.refused(call.channel.jobs("s@v2"), RateLimited("slowly", retry_after=1.0))

    assert call.channel.jobs("s@v1") == []
    assert len(call.channel.jobs("s@v2")) == 4
    assert call.channel.sent[-1].until != 0.0


def test_the_fallback_has_no_fallback() -> None:
    call = Call()
    call.transfer.refused(call.channel.jobs("s@v2"), QueueFull("full"))

    for job_id in call.channel.jobs("s@v1"):
        call.answer(job_id, Reply(error=ModelFailed("broken, too")))

    with pytest.raises(ModelFailed, match="broken, too"):
        call.handle.result(0)


def test_jobs_in_flight_are_withdrawn() -> None:
    call = Call()
    first, second = call.channel.jobs("s@v2")

    call.answer(first, Reply(error=ModelFailed("broken")))

    assert call.channel.cancelled == [second]


def test_a_call_whose_workers_died_leaves_before_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call()
    call.watch.live_workers = 0
    later = time.monotonic() + WATCH_S
    monkeypatch.setattr("millstream.client.handle.time.monotonic", lambda: later)

    call.handle.expire()
    call.watch.live_workers = 1

    assert set(call.channel.cancelled) == set(call.channel.jobs("s@v2"))
    call.finish()
    assert list(call.handle.result(0)) == ["v1"] * 4


def test_half_of_the_timeout_is_for_the_fallback() -> None:
    call = Call(timeout=1.0)
    began = call.transfer.began

    assert {draft.deadline for each in call.channel.sent for draft in each.group.drafts} == {began + 0.5}
    call.transfer.refused(call.channel.jobs("s@v2"), QueueFull("full"))

    late = {draft.deadline for each in call.channel.sent if each.service == "s@v1" for draft in each.group.drafts}
    assert late == {began + 1.0}


def test_a_text_that_its_caller_may_have_seen_is_not_generated_again() -> None:
    call = Call(op="stream", growing=GrowingText())
    (job_id,) = call.channel.jobs("s@v2")
    call.transfer.emitted(job_id, encode_delta(Delta(0, "a ")))

    call.answer(job_id, Reply(error=ModelFailed("broken")))

    assert call.channel.jobs("s@v1") == []
    with pytest.raises(ModelFailed):
        call.handle.result(0)


def test_a_text_has_half_of_the_timeout_to_begin_and_all_of_it_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    late, begun = Call(timeout=10.0, op="stream"), Call(timeout=10.0, op="stream")
    assert {draft.deadline for each in late.channel.sent for draft in each.group.drafts} == {late.transfer.began + 10.0}
    begun.transfer.emitted(begun.channel.jobs("s@v2")[0], encode_delta(Delta(0, "a ")))
    now = begun.transfer.began + 5.0
    monkeypatch.setattr("millstream.client.handle.time.monotonic", lambda: now)

    late.handle.expire()
    begun.handle.expire()

    assert len(late.channel.jobs("s@v1")) == 1
    assert begun.channel.jobs("s@v1") == []


def test_a_text_that_has_not_begun_is() -> None:
    call = Call(op="stream", growing=GrowingText())

    call.answer(call.channel.jobs("s@v2")[0], Reply(error=ModelFailed("broken")))

    assert len(call.channel.jobs("s@v1")) == 1


@pytest.mark.parametrize("error", [NoWorkers(""), ModelFailed(""), QueueFull(""), DeadlineExceeded(""), WorkerLost("")])
def test_what_another_version_may_not_have_is_a_reason(error: MillstreamError) -> None:
    assert falls_back(error)
    assert falls_back(Reply(values=["a"], errors={0: error}))


@pytest.mark.parametrize("error", [InvalidRequest(""), InputTooLong(""), BrokerUnavailable(""), RateLimited("")])
def test_what_all_versions_have_is_none(error: MillstreamError) -> None:
    assert not falls_back(error)
    assert not falls_back(Reply(error=error))
