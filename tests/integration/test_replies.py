"""A client's replies reach it through any cut, and none is kept once it was read."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import redis
from contracts.queue import CALLER, Queue, draft
from support import eventually

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.replies import DELETE_BYTES, DELETE_COUNT, READ_COUNT, Answer, Replies
from millstream.broker.transport.connection import Connection, is_transient
from millstream.broker.transport.link import Words, exchange

LONG_S = 30.0


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open(max_queue_size=100_000)
    return opened


@pytest.fixture
def replies(connection: Connection, queue: Queue) -> Replies:
    return Replies(connection.blocking(LONG_S), queue.keys, CALLER)


def sleeping(queue: Queue) -> list[int]:
    """The connections on which a reader is blocked, or was at its last word."""
    return [int(each["id"]) for each in queue.client.client_list(_type="normal") if each["cmd"] == "xread"]


def cut(queue: Queue) -> int:
    """Have the server drop the readers' connections; how many."""
    return sum(int(queue.client.client_kill_filter(_id=str(each))) for each in sleeping(queue))


def answer(queue: Queue, count: int) -> list[str]:
    """Have `count` jobs enqueued, claimed and answered; their ids."""
    answered: list[str] = []
    while len(answered) < count:
        drafts = queue.put(*[draft() for _ in range(min(100, count - len(answered)))])
        claims = queue.claim().claims
        assert queue.settle(claims, claims[0].address.job_id.encode()) == ["answered"] * len(drafts)
        answered += [each.id for each in drafts]
    return answered


def test_replies_come_in_order_with_their_job_and_bytes(queue: Queue, replies: Replies) -> None:
    drafts = queue.put(draft(), draft())
    first, second = queue.claim().claims
    queue.settle([first], b"\x00\xff\n")
    queue.settle([second], b"")

    assert replies.read(LONG_S) == [(drafts[0].id, b"\x00\xff\n", True), (drafts[1].id, b"", True)]


def test_deltas_come_in_order_with_replies_and_entries_of_other_shapes_are_ignored_and_deleted(
    queue: Queue, replies: Replies
) -> None:
    key = queue.keys.reply(CALLER)
    for fields in ({"id": "a", "delta": "0 x"}, {"id": "b", "text": "no"}, {"delta": "0 y"}, {"id": "a", "reply": "z"}):
        queue.client.xadd(key, cast(dict[Any, Any], fields))
    queue.client.pexpire(key, 60_000)

    assert replies.read(LONG_S) == [("a", b"0 x", False), ("a", b"z", True)]
    assert replies.read(0.01) == []
    assert replies.read(0.01) == []
    assert queue.client.xlen(key) == 0


def test_many_replies_are_deleted_with_the_next_read(queue: Queue, replies: Replies) -> None:
    first = answer(queue, DELETE_COUNT)
    assert [job_id for job_id, *_ in replies.read(LONG_S)] == first
    second = answer(queue, 2)

    assert [job_id for job_id, *_ in replies.read(LONG_S)] == second
    assert [job_id for job_id, _ in queue.replies()] == second


def test_a_large_reply_is_deleted_with_the_next_read(queue: Queue, replies: Replies) -> None:
    queue.put(draft())
    queue.settle(queue.claim().claims, b"x" * DELETE_BYTES)
    assert len(replies.read(LONG_S)) == 1

    assert replies.read(0.01) == []
    assert queue.replies() == []


def test_few_replies_stay_until_nothing_more_comes(queue: Queue, replies: Replies) -> None:
    read = [answer(queue, 1) + [job_id for job_id, *_ in replies.read(LONG_S)] for _ in range(DELETE_COUNT - 1)]

    assert all(answered == got for answered, got in read)
    assert len(queue.replies()) == DELETE_COUNT - 1
    assert replies.read(0.01) == []
    assert replies.read(0.01) == []
    assert queue.replies() == []


def test_a_stream_that_begins_anew_with_smaller_ids_loses_nothing(queue: Queue, replies: Replies) -> None:
    key = queue.keys.reply(CALLER)
    queue.client.xadd(key, {"id": "1" * 32, "reply": "before"}, id="9-1")
    assert len(replies.read(LONG_S)) == 1
    queue.client.delete(key)
    queue.client.xadd(key, {"id": "2" * 32, "reply": "after"}, id="5-1")
    queue.client.expire(key, 60)

    assert replies.read(0.01) == []
    assert replies.read(LONG_S) == [("2" * 32, b"after", True)]


def test_more_replies_than_one_read_holds_come_with_the_next(queue: Queue, replies: Replies) -> None:
    answered = answer(queue, READ_COUNT + 50)

    assert [job_id for job_id, *_ in replies.read(LONG_S) + replies.read(LONG_S)] == answered


def test_a_read_without_replies_ends_after_its_time(replies: Replies) -> None:
    assert replies.read(0.01) == []


def test_a_reply_wakes_a_sleeping_reader(queue: Queue, replies: Replies) -> None:
    woken: list[list[Answer]] = []
    thread = threading.Thread(target=lambda: woken.append(replies.read(LONG_S)))
    thread.start()
    eventually(lambda: sleeping(queue))

    answered = answer(queue, 1)

    thread.join(LONG_S)
    assert [job_id for job_id, *_ in woken[0]] == answered


def test_a_read_whose_answer_was_lost_on_its_way_is_read_again(
    queue: Queue, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = answer(queue, 5) and replies.read(LONG_S)
    lost = answer(queue, 5)

    def exchange_and_cut(client: redis.Redis, *commands: Words) -> list[Any]:
        exchange(client, *commands)
        raise redis.ConnectionError("cut")

    monkeypatch.setattr("millstream.broker.queue.replies.exchange", exchange_and_cut)
    with pytest.raises(redis.ConnectionError):
        replies.read(LONG_S)
    monkeypatch.undo()
    again = replies.read(LONG_S)

    assert len(read) == 5
    assert [job_id for job_id, *_ in again] == lost


def test_replies_under_smaller_ids_are_read_too_as_after_a_servers_clock_stepped_back(
    queue: Queue, replies: Replies
) -> None:
    answer(queue, 1)
    assert len(replies.read(LONG_S)) == 1
    assert replies.read(0.01) == []
    queue.client.delete(queue.keys.reply(CALLER))
    queue.client.xadd(queue.keys.reply(CALLER), {"id": "late", "reply": "still"}, id="1-1")
    queue.client.pexpire(queue.keys.reply(CALLER), 60_000)

    assert replies.read(LONG_S) == [("late", b"still", True)]


def test_replies_survive_a_connection_that_is_cut_again_and_again(queue: Queue, replies: Replies) -> None:
    answered: list[str] = []
    read: list[str] = []
    cuts: list[int] = []
    done = threading.Event()

    def cut_until_done() -> None:
        while not done.is_set():
            cuts.append(cut(queue))

    threads = [
        threading.Thread(target=lambda: answered.extend(answer(queue, 4_000))),
        threading.Thread(target=cut_until_done),
    ]
    for thread in threads:
        thread.start()
    errors: list[Exception] = []
    while threads[0].is_alive() or len(set(read)) < len(answered):
        try:
            read += [job_id for job_id, *_ in replies.read(0.2)]
        except redis.RedisError as error:
            errors.append(error)
    done.set()
    for thread in threads:
        thread.join(LONG_S)

    assert set(read) == set(answered)
    assert len(answered) == 4_000
    assert sum(cuts) > 0
    assert errors
    assert all(is_transient(error) for error in errors)
