"""Refused jobs wait in lines: one is sent as a probe, the others keep their places behind it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import BrokerUnavailable, InvalidRequest, MillstreamError, QueueFull, RateLimited
from millstream.broker.contract.job import PRIORITIES, Draft, Priority
from millstream.broker.queue.backlog import Backlog
from millstream.broker.queue.stream_types import Admission, Group
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.submission import Submission
from millstream.broker.queue.submitter import Submitter, deliver


@dataclass
class FakeServer:
    """Accepts `room` jobs in the order they come; counts script calls and the jobs in them."""

    room: int = 0
    retry_after: float = 0.01
    away: bool = False
    accepted: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    counted: int = 0
    limited: set[str] = field(default_factory=set)

    def enqueue(self, groups: Sequence[Group]) -> list[Admission]:
        self.calls.append(len(groups))
        if self.away:
            raise BrokerUnavailable("away")
        return [self._admit(group) for group in groups]

    def _admit(self, group: Group) -> Admission:
        (draft,) = group.drafts
        if draft.op == "impossible":
            return Admission("over_burst")
        if draft.tenant in self.limited:
            self.counted += group.refusals
            return Admission("rate_limited", self.retry_after)
        if not self.room:
            self.counted += group.refusals
            return Admission("queue_full", self.retry_after, limit=50)
        self.room -= 1
        self.accepted.append(draft.id)
        return Admission()


@dataclass
class Sink:
    errors: dict[str, MillstreamError] = field(default_factory=dict)

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def emitted(self, job_id: str, delta: bytes) -> None: ...

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.errors |= dict.fromkeys(job_ids, error)


def submission(
    job_id: str,
    *,
    until: float | None = None,
    tenant: str = "",
    op: str = "echo",
    sink: Sink | None = None,
    priority: Priority = Priority.NORMAL,
) -> Submission:
    draft = Draft(job_id, op, 1, 1, b"{}", tenant=tenant)
    return Submission("s", Group(priority, [draft]), sink or Sink(), until, tenant)


def submitter(server: FakeServer) -> Submitter:
    return Submitter(
        lambda service: cast(Streams, server),
        "redis://nowhere",
        lambda each, error: each.sink.refused(each.job_ids, error),
    )


def retry(submitter: Submitter, until_idle: int = 100) -> None:
    """Send again whatever may be sent at once, without waiting for the next probe."""
    for _ in range(until_idle):
        at = submitter.next_at
        if at is None or at > time.monotonic():
            return
        submitter.retry()


def wait_and_retry(submitter: Submitter) -> None:
    at = submitter.next_at
    assert at is not None
    while time.monotonic() < at:
        pass
    submitter.retry()


def test_of_two_thousand_that_wait_one_is_sent_each_time() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission(f"{n}") for n in range(128)])
    for n in range(128, 2_000):
        sends.submit([submission(f"{n}")])

    for _ in range(5):
        wait_and_retry(sends)

    assert server.calls == [128, 1, 1, 1, 1, 1]
    assert server.accepted == []


def test_when_there_is_room_again_they_are_sent_in_order_and_in_growing_numbers() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission(f"{n}") for n in range(100)])
    server.room = 1_000

    wait_and_retry(sends)
    retry(sends)

    assert server.accepted == [f"{n}" for n in range(100)]
    assert server.calls == [100, 1, 2, 4, 8, 16, 32, 37]


def test_what_comes_later_does_not_overtake_what_waits() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission("first")])
    server.room = 2

    sends.submit([submission("second")])
    wait_and_retry(sends)
    retry(sends)

    assert server.accepted == ["first", "second"]


def test_another_priority_waits_for_nobody() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission("bulk", priority=Priority.BATCH)])
    server.room = 1

    sends.submit([submission("urgent", priority=Priority.REALTIME)])

    assert server.accepted == ["urgent"]


def test_a_tenant_at_its_limit_holds_up_no_other() -> None:
    server = FakeServer(room=10, limited={"a"})
    sends = submitter(server)

    sends.submit([submission("a1", tenant="a"), submission("b1", tenant="b")])
    sends.submit([submission("a2", tenant="a"), submission("b2", tenant="b")])

    assert server.accepted == ["b1", "b2"]


def test_a_full_queue_is_asked_for_once_for_all_tenants() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission("a", tenant="a")])
    for n in range(50):
        sends.submit([submission(f"{n}", tenant=f"{n}")])

    assert server.calls == [1]


def test_when_room_appears_each_tenant_has_its_turn() -> None:
    server = FakeServer(retry_after=0.0)
    sends = submitter(server)
    sends.submit([submission(f"a{n}", tenant="a") for n in range(20)])
    sends.submit([submission("b", tenant="b")])

    for n in range(20, 40):
        server.room = 1
        sends.submit([submission(f"a{n}", tenant="a")])
        sends.retry()
        sends.retry()
        if "b" in server.accepted:
            break

    assert "b" in server.accepted[:4]


def test_the_bodies_of_what_nobody_wants_are_let_go() -> None:
    backlog = Backlog()
    names = [f"{n}" for n in range(1_000)]
    backlog.put_back([submission("first")], lambda: QueueFull("full"), 1.0, whole_queue=True)
    for name in names:
        backlog.append(submission(name))

    backlog.withdraw(names)

    (queue,) = backlog._queues.values()
    (line,) = queue.lines.values()
    assert len(line.waiting) < 100


def test_what_waits_when_the_client_closes_is_refused() -> None:
    sends, sink = submitter(FakeServer()), Sink()
    sends.submit([submission("a", sink=sink), submission("b", sink=sink)])

    sends.close(lambda: BrokerUnavailable("closed"))

    assert set(sink.errors) == {"a", "b"}
    assert sends.next_at is None


def test_a_server_that_was_away_has_counted_nobody() -> None:
    server = FakeServer(away=True)
    sends = submitter(server)
    sends.submit([submission("a")])
    server.away = False

    wait_and_retry(sends)

    assert server.counted == 1


def test_each_call_is_told_which_priority_is_full() -> None:
    server, sink = FakeServer(), Sink()
    sends = submitter(server)

    sends.submit([submission(each.value, until=0.0, sink=sink, priority=each) for each in PRIORITIES])

    ends = {job_id: error.message.partition(" is ")[2] for job_id, error in sink.errors.items()}
    assert ends == {each: f"full for priority {each}: max_queue_size is 50" for each in PRIORITIES}


def test_a_call_that_does_not_wait_neither_passes_those_that_do_nor_stays() -> None:
    server, sink = FakeServer(), Sink()
    sends = submitter(server)
    sends.submit([submission("patient")])
    server.room = 1

    sends.submit([submission("hasty", until=0.0, sink=sink)])
    wait_and_retry(sends)

    assert isinstance(sink.errors["hasty"], QueueFull)
    assert server.accepted == ["patient"]
    assert sends.next_at is None


def test_each_call_is_counted_as_refused_once_however_often_it_is_sent() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission("a"), submission("b")])
    sends.submit([submission("hasty", until=0.0)])

    for _ in range(4):
        wait_and_retry(sends)

    assert server.counted == 3


def test_what_is_over_is_told_why_it_waited_and_not_sent() -> None:
    server, sink = FakeServer(retry_after=0.001), Sink()
    sends = submitter(server)
    sends.submit([submission("late", until=time.monotonic() + 0.02, sink=sink)])
    while not sink.errors:
        wait_and_retry(sends)
    server.room = 1
    retry(sends)

    assert isinstance(sink.errors["late"], QueueFull)
    assert server.accepted == []


def test_what_is_withdrawn_is_not_sent_and_counts_as_having_waited() -> None:
    server = FakeServer()
    sends = submitter(server)
    sends.submit([submission("a"), submission("b"), submission("c")])

    assert sends.withdraw(["b", "unknown"]) == {"b"}
    server.room = 10
    wait_and_retry(sends)
    retry(sends)

    assert server.accepted == ["a", "c"]
    assert sends.withdraw(["a"]) == set()


def test_why_a_job_waits_can_be_asked_by_each_of_its_callers() -> None:
    sends = submitter(FakeServer(limited={"t"}))
    sends.submit([submission("a", tenant="t")])

    first, second = sends.refusal_of("a"), sends.refusal_of("a")

    assert isinstance(first, RateLimited)
    assert first is not second
    assert sends.refusal_of("b") is None


def test_a_request_that_can_never_succeed_holds_up_nobody() -> None:
    server, sink = FakeServer(room=1), Sink()
    sends = submitter(server)

    sends.submit([submission("too large", op="impossible", sink=sink), submission("small")])

    assert isinstance(sink.errors["too large"], InvalidRequest)
    assert server.accepted == ["small"]


def test_what_a_server_that_is_away_did_not_take_arrives_in_order_when_it_is_back() -> None:
    server = FakeServer(room=100, away=True)
    sends = submitter(server)
    sends.submit([submission(f"{n}") for n in range(20)])
    sends.submit([submission("20")])
    server.away = False

    wait_and_retry(sends)
    retry(sends)

    assert server.accepted == [f"{n}" for n in range(21)]


def test_one_that_is_delivered_waits_for_room_or_raises() -> None:
    server = FakeServer()
    streams = cast(Streams, server)
    draft = Draft("a", "echo", 1, 1, b"{}")

    with pytest.raises(QueueFull):
        deliver(streams, "redis://nowhere", "s", Group(Priority.NORMAL, [draft]))
    with pytest.raises(QueueFull):
        deliver(streams, "redis://nowhere", "s", Group(Priority.NORMAL, [draft]), wait_s=0.03)
    server.room = 1
    deliver(streams, "redis://nowhere", "s", Group(Priority.NORMAL, [draft]), wait_s=5.0)

    assert server.accepted == ["a"]
    assert len(server.calls) > 3


ops = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 4)),
        st.tuples(st.just("room"), st.integers(0, 6)),
        st.tuples(st.just("retry"), st.integers(1, 3)),
        st.tuples(st.just("withdraw"), st.integers(0, 30)),
    ),
    max_size=60,
)


@given(ops)
def test_in_any_order_nothing_is_lost_sent_twice_or_out_of_turn(steps: list[tuple[str, int]]) -> None:
    server = FakeServer(retry_after=0.0)
    sends = submitter(server)
    made: list[str] = []
    withdrawn: set[str] = set()
    for step, n in steps:
        if step == "submit":
            names = [f"{len(made) + at}" for at in range(n)]
            made += names
            sends.submit([submission(name) for name in names])
        elif step == "room":
            server.room = n
        elif step == "withdraw":
            withdrawn |= sends.withdraw([f"{n}"])
        else:
            retry(sends, n)
    server.room = 1_000
    retry(sends)

    assert server.accepted == [name for name in made if name not in withdrawn]
    assert sends.next_at is None


def test_one_job_that_two_callers_submit_is_accepted_for_both() -> None:
    server, told = FakeServer(), list[str]()
    sends = submitter(server)
    for caller in ("first", "second"):
        sends.submit([submission("same")._replace(accepted=lambda caller=caller: told.append(caller))])  # type: ignore[misc]
    server.room = 2

    wait_and_retry(sends)
    retry(sends)

    assert told == ["first", "second"]
    assert sends.next_at is None


def test_a_line_that_nobody_waits_in_any_more_is_forgotten() -> None:
    backlog = Backlog()
    backlog.put_back([submission("a"), submission("b")], lambda: QueueFull("full"), 1.0, whole_queue=True)

    backlog.withdraw(["a", "b"])

    assert backlog.next_at is None
    assert backlog.append(submission("c")) is None
