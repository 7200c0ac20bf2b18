"""The sender keeps the order of what it is told, retries what was refused, and lets a cancellation overtake nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import pytest
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, QueueFull, UnknownService
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Admission, CancelOutcome, Group
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.connection import Connection
from millstream.client.channel import sender as sender_module
from millstream.client.channel.channel import Channel
from millstream.client.channel.requests import Cancellation
from millstream.client.channel.sender import Sender
from millstream.client.channel.wake_chain import WakeChain

Told = Sequence[CancelOutcome] | MillstreamError


class FakeStreams:
    """A server that accepts while it has room, and keeps what it was sent."""

    def __init__(self) -> None:
        self.room = 1_000
        self.retry_after = 0.01
        self.accepted: list[str] = []
        self.cancelled: list[str] = []
        self.script_calls: list[int] = []
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def enqueue(self, groups: Sequence[Group]) -> list[Admission]:
        self.gate.wait(10)
        self.script_calls.append(len(groups))
        if self.away:
            raise BrokerUnavailable("away")
        return [self._admit([draft.id for draft in group.drafts]) for group in groups]

    def _admit(self, ids: list[str]) -> Admission:
        if len(ids) > self.room:
            return Admission("queue_full", self.retry_after)
        self.room -= len(ids)
        self.accepted += ids
        return Admission()

    def cancel(self, job_ids: Sequence[str], client: str, call: str = "") -> list[CancelOutcome]:
        self.script_calls.append(len(job_ids))
        if self.away:
            raise BrokerUnavailable("away")
        self.cancelled += job_ids
        return ["waiting" if job_id in self.accepted else "gone" for job_id in job_ids]


class Sink:
    def __init__(self) -> None:
        self.errors: dict[str, MillstreamError] = {}

    def answered(self, job_id: str, reply: bytes) -> None:
        raise NotImplementedError

    emitted = answered

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.errors |= dict.fromkeys(job_ids, error)


class FakeSender(Sender):
    def __init__(self, streams: FakeStreams) -> None:
        connection = Connection("redis://nowhere")
        super().__init__(connection, Registry(connection), "caller", lambda service, job_ids: None, self._under_way)
        self._fake = streams
        self.under_way = 0

    def _streams(self, service: str) -> Streams:
        return cast(Streams, self._fake)

    def _under_way(self) -> int:
        return self.under_way


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


@pytest.fixture
def sender(streams: FakeStreams) -> FakeSender:
    """Not started: a test puts what it wants first."""
    return FakeSender(streams)


def submission(
    *ids: str, sink: Sink | None = None, service: str = "s", until: float | None = None, op: str = "echo"
) -> Submission:
    drafts = [Draft(each, op, 1, 1, b"{}") for each in ids]
    return Submission(service, Group(Priority.NORMAL, drafts), sink or Sink(), until)


def cancellation(told: list[Told], *ids: str) -> Cancellation:
    return Cancellation("s", ids, told.append)


def test_submissions_of_one_service_travel_together_in_order(sender: FakeSender, streams: FakeStreams) -> None:
    sender.put([submission(f"{n}") for n in range(300)])
    sender.start()

    eventually(lambda: len(streams.accepted) == 300)
    sender.close()

    assert streams.accepted == [f"{n}" for n in range(300)]
    assert streams.script_calls == [128, 128, 44]


@pytest.mark.parametrize(("op", "at_first", "calls"), [("generate", 2, [5]), ("generate", 1, [1]), ("echo", 2, [2])])
def test_texts_that_are_called_one_after_another_travel_together(
    sender: FakeSender, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch, op: str, at_first: int, calls: list[int]
) -> None:
    later = [submission(f"{n}", op=op) for n in range(3)]
    monkeypatch.setattr(sender_module, "TEXTS_S", 60.0)
    monkeypatch.setattr(sender._changed, "wait", lambda seconds: sender.put([later.pop()]) if later else None)
    sender.put([submission(f"first {n}", op=op) for n in range(at_first)])

    sender._step()

    assert streams.script_calls == calls


@pytest.fixture
def wake_chain(monkeypatch: pytest.MonkeyPatch) -> WakeChain:
    """Not the one that this process's other threads are woken by."""
    made = WakeChain()
    monkeypatch.setattr(sender_module, "wake_chain", made)
    return made


@pytest.fixture
def answered(wake_chain: WakeChain) -> list[threading.Lock]:
    """Two callers that are to run, and do not yet."""
    locks = [threading.Lock(), threading.Lock()]
    for each in locks:
        each.acquire()
    wake_chain.wake(locks)
    return locks


def test_the_sender_waits_for_what_callers_send_that_are_being_woken(
    sender: FakeSender,
    streams: FakeStreams,
    wake_chain: WakeChain,
    answered: list[threading.Lock],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender_module, "LINGER_S", 60.0)
    sender.under_way = 3 * sender_module.LINGER_SHARE
    sender.start()

    sender.put([submission("a")])
    eventually(lambda: wake_chain.due == 3)
    wake_chain.leave(answered[0])
    sender.put([submission("b"), submission("c")])
    wake_chain.leave(answered[1])
    eventually(lambda: len(streams.accepted) == 3)
    sender.put([submission("d")])
    eventually(lambda: len(streams.accepted) == 4)
    sender.close()

    assert streams.script_calls == [3, 1]


@pytest.mark.usefixtures("answered")
def test_the_sender_waits_for_a_share_of_the_jobs_under_way_only(
    sender: FakeSender,
    streams: FakeStreams,
    wake_chain: WakeChain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender_module, "LINGER_S", 60.0)
    sender.under_way = sender_module.LINGER_SHARE
    sender.start()

    sender.put([submission("a")])
    eventually(lambda: streams.accepted)
    sender.close()

    assert wake_chain.due == 2


@pytest.mark.usefixtures("answered")
def test_the_sender_waits_for_a_moment_only(sender: FakeSender, streams: FakeStreams, wake_chain: WakeChain) -> None:
    sender.under_way = 100
    sender.start()

    sender.put([submission("a")])
    eventually(lambda: streams.accepted)
    sender.close()

    assert wake_chain.due == 2


def test_the_sender_knows_the_jobs_under_way_of_all_services() -> None:
    connection = Connection("redis://127.0.0.1:1")
    client = Channel(connection, Registry(connection))

    client.submit([submission("a", "b"), submission("c", service="t")])
    under_way = client._open_sender()._awaited()
    client.close()

    assert under_way == 3


def test_a_cancellation_follows_what_was_submitted_before_it(sender: FakeSender, streams: FakeStreams) -> None:
    told: list[Told] = []
    streams.gate.clear()
    sender.start()
    sender.put([submission("first")])
    eventually(lambda: not sender._ready)
    sender.put([submission("second"), cancellation(told, "first")])
    streams.gate.set()

    eventually(lambda: told)
    sender.close()

    assert told == [["waiting"]]
    assert streams.accepted == ["first", "second"]


def test_what_is_cancelled_before_it_was_sent_is_never_sent_and_counts_as_waiting(
    sender: FakeSender, streams: FakeStreams
) -> None:
    told: list[Told] = []
    streams.room, streams.retry_after = 0, 0.2
    sender.start()
    sender.put([submission("crowded"), submission("patient")])
    eventually(lambda: sender.refusal_of("crowded") and sender.refusal_of("patient"))
    sender.put([cancellation(told, "crowded")])
    eventually(lambda: told)
    streams.room = 10

    eventually(lambda: streams.accepted and not sender.refusal_of("crowded") and not sender._ready)
    sender.close()

    assert told == [["waiting"]]
    assert streams.accepted == ["patient"]


def test_cancellations_travel_together_and_each_hears_of_its_own_jobs(sender: FakeSender, streams: FakeStreams) -> None:
    told: list[list[Told]] = [[] for _ in range(200)]
    streams.accepted = [f"{n}" for n in range(0, 200, 2)]
    sender.put([cancellation(told[n], f"{n}") for n in range(200)])
    sender.start()

    eventually(lambda: all(told))
    sender.close()

    assert [each[0] for each in told] == [["waiting" if n % 2 == 0 else "gone"] for n in range(200)]
    assert streams.script_calls == [128, 72]


def test_a_cancellation_that_cannot_be_asked_says_so_to_everyone(sender: FakeSender, streams: FakeStreams) -> None:
    told: list[Told] = []
    streams.away = True
    sender.put([cancellation(told, "a"), cancellation(told, "b")])
    sender.start()

    eventually(lambda: len(told) == 2)
    sender.close()

    assert [type(each) for each in told] == [BrokerUnavailable] * 2


def test_a_cancellation_that_a_closing_sender_has_left_is_told(sender: FakeSender) -> None:
    told: list[Told] = []
    sender.put([cancellation(told, "a")])
    sender.close()
    sender.start()

    eventually(lambda: told)

    assert isinstance(told[0], BrokerUnavailable)


def test_a_refusal_is_waited_out_where_there_is_time(sender: FakeSender, streams: FakeStreams) -> None:
    sink = Sink()
    streams.room = 0
    sender.put([submission("hasty", sink=sink, until=0.0), submission("patient", sink=sink)])
    sender.start()
    eventually(lambda: sink.errors)
    streams.room = 1

    eventually(lambda: streams.accepted == ["patient"])
    sender.close()

    assert isinstance(sink.errors.pop("hasty"), QueueFull)
    assert sink.errors == {}


def test_what_is_sent_while_the_server_is_away_arrives_when_it_is_back(
    sender: FakeSender, streams: FakeStreams
) -> None:
    streams.away = True
    sender.put([submission("a")])
    sender.start()
    eventually(lambda: streams.script_calls)
    streams.away = False

    eventually(lambda: streams.accepted == ["a"])
    sender.close()


def test_a_service_that_is_gone_refuses(
    sender: FakeSender, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink()
    monkeypatch.setattr(streams, "_admit", lambda ids: Admission("unknown_service"))
    sender.put([submission("a", sink=sink)])
    sender.start()

    eventually(lambda: sink.errors)
    sender.close()

    assert isinstance(sink.errors["a"], UnknownService)
