"""One caller's fault, or a thread that cannot start, ends nobody else's calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import pytest
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.replies import Answer, Replies
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.connection import Connection
from millstream.client.channel.channel import Channel
from millstream.client.channel.reader import Reader


class Sink:
    """Keeps what it hears; raises first if it is `broken`."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.heard: list[object] = []

    def answered(self, job_id: str, reply: bytes) -> None:
        if self.broken:
            raise IndexError("a fault of this call alone")
        self.heard.append(reply)

    emitted = answered

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.heard.append(error)
        if self.broken:
            raise IndexError("once more")


class FakeReplies:
    def __init__(self) -> None:
        self.batches: list[list[Answer]] = []

    def read(self, wait_s: float) -> list[Answer]:
        return self.batches.pop(0) if self.batches else []


def submission(job_id: str, sink: Sink) -> Submission:
    return Submission("s", Group(Priority.NORMAL, [Draft(job_id, "echo", 1, 1, b"{}")]), sink, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_fails_on_its_reply_is_told_and_its_neighbours_are_answered() -> None:
    replies, bad, good = FakeReplies(), Sink(broken=True), Sink()
    reader = Reader("s", cast(Replies, replies))
    reader.expect(submission("bad", bad))
    reader.expect(submission("good", good))
    replies.batches.append([Answer("bad", b"reply", True), Answer("good", b"reply", True)])

    reader.start()
    eventually(lambda: good.heard)
    reader.close()

    assert good.heard == [b"reply"]
    assert len(bad.heard) == 1
    assert isinstance(bad.heard[0], MillstreamError)


def test_a_calls_deltas_come_before_its_reply_and_end_nothing() -> None:
    replies, sink = FakeReplies(), Sink()
    reader = Reader("s", cast(Replies, replies))
    reader.expect(submission("a", sink))
    replies.batches.append([Answer("a", b"0 x", False), Answer("a", b"1 y", False)])
    replies.batches.append([Answer("a", b"reply", True), Answer("a", b"2 z", False)])

    reader.start()
    eventually(lambda: reader.awaited == 0)
    reader.close()
    reader.join()

    assert sink.heard == [b"0 x", b"1 y", b"reply"]
    assert reader.strays == 0


def test_a_call_that_fails_on_a_delta_still_gets_its_reply_and_others_get_theirs() -> None:
    class FailsOnDeltas(Sink):
        def emitted(self, job_id: str, delta: bytes) -> None:
            raise IndexError("a fault of this delta alone")

    replies, bad, good = FakeReplies(), FailsOnDeltas(), Sink()
    reader = Reader("s", cast(Replies, replies))
    reader.expect(submission("bad", bad))
    reader.expect(submission("good", good))
    replies.batches.append([Answer(job_id, b"0 x", False) for job_id in ("bad", "good")])
    replies.batches.append([Answer(job_id, b"reply", True) for job_id in ("bad", "good")])

    reader.start()
    eventually(lambda: reader.awaited == 0)
    reader.close()
    reader.join()

    assert (bad.heard, good.heard) == ([b"reply"], [b"0 x", b"reply"])


@pytest.mark.parametrize("first", ["millstream-sender", "millstream-reader-s"])
def test_a_thread_that_cannot_start_is_started_by_the_next_call(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    connection = Connection("redis://127.0.0.1:1")
    channel = Channel(connection, Registry(connection))
    start, failures = threading.Thread.start, [first]

    def failing(thread: threading.Thread) -> None:
        if thread.name in failures:
            failures.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(BrokerUnavailable, match="cannot start"):
        channel.submit([submission("a", Sink())])
    channel.submit([submission("b", Sink())])

    assert all(thread.is_alive() for thread in (channel._open_sender(), channel._open_reader("s")))
    channel.close()
