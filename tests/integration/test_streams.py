"""What only a real server shows of the job streams: lost groups, cold script caches, full memory, sleeping workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import redis
from contracts.queue import CALLER, Queue, draft, ids, names
from support import eventually

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import MillstreamError, QueueFull, ReaderTooSlow, ReplyTooLarge
from millstream.broker.contract.job import PRIORITIES, Claim, Priority
from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.queue import streams
from millstream.broker.queue.claims import ClaimBudget
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.queue.streams import Streams
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection, translated

LONG_S = 30.0


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open()
    return opened


@pytest.fixture
def own_queue(tmp_path: Path, server_binary: Path) -> Iterator[Queue]:
    """On a server that a test may harm."""
    with EmbeddedServer.start(tmp_path / "data", binary=server_binary) as server:
        connection = Connection(server.url, name="tests")
        opened = Queue(connection.client, ServiceKeys("embed"))
        opened.open()
        yield opened
        connection.close()


def blocked(queue: Queue) -> int:
    """Clients that sleep in the server."""
    return int(queue.client.info("clients")["blocked_clients"])


def test_a_deleted_stream_is_reported_to_claims_waits_and_beats_and_the_new_group_loses_nothing(queue: Queue) -> None:
    queue.client.delete(queue.keys.stream(Priority.NORMAL))
    (job,) = queue.put(draft())

    with pytest.raises(redis.ResponseError, match="NOGROUP"):
        queue.claim()
    with pytest.raises(redis.ResponseError, match="NOGROUP"):
        queue.wait(wait_s=0.1)
    with pytest.raises(redis.ResponseError, match="NOGROUP"):
        queue.lease.beat("w1", {}, [])
    queue.streams.create_groups()
    queue.streams.create_groups()

    assert ids(queue.claim().claims) == [job.id]


def test_a_stream_deleted_under_a_blocked_wait_is_reported_as_a_missing_group(own_queue: Queue) -> None:
    errors: list[str] = []

    def work() -> None:
        # Redis 6.2 sleeps on, 7.0 wakes the wait with an error of its own: the claim behind it says what it is.
        with pytest.raises(redis.ResponseError) as caught:
            own_queue.wait(wait_s=1.0)
        errors.append(str(caught.value))

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: blocked(own_queue) == 1)
    own_queue.client.delete(*own_queue.keys.streams())
    thread.join(LONG_S)

    assert "NOGROUP" in errors[0]


def test_every_script_runs_on_a_server_that_has_forgotten_them_all(own_queue: Queue) -> None:
    client = own_queue.client
    job = draft()

    client.script_flush()
    own_queue.put(job)
    client.script_flush()
    claims = own_queue.claim("w1").claims
    client.script_flush()
    own_queue.lease.beat("w1", {}, names(claims))
    client.script_flush()
    assert own_queue.lease.reclaim() == 0
    client.script_flush()
    assert own_queue.lease.release("w1") == 1
    again = own_queue.claim("w2").claims
    client.script_flush()
    assert own_queue.wait("w2").claims == []
    client.script_flush()

    assert own_queue.settle(again) == ["answered"]
    assert own_queue.replies() == [(job.id, b"reply")]


def test_at_full_memory_jobs_are_refused_and_those_accepted_are_still_answered(own_queue: Queue) -> None:
    for client in ("caller", ""):
        own_queue.put(draft(client=client), draft(client=client))
    own_queue.lease.beat("w1", {}, [])
    claims = own_queue.claim("w1").claims
    own_queue.client.config_set("maxmemory", 1)

    with pytest.raises(QueueFull), translated("here"):
        own_queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])
    assert own_queue.settle(claims[:3]) == ["answered"] * 3
    assert own_queue.settle(claims[3:], bury="max_attempts") == ["answered"]

    assert [job_id for job_id, _ in own_queue.replies()] == ids(claims[:2])
    for claim in claims[2:]:
        assert own_queue.client.get(own_queue.keys.result(claim.address.job_id)) == b"reply"
    assert len(own_queue.dead_letters()) == 1
    assert own_queue.depth() == 0


def test_the_lag_that_redis_cli_shows_is_what_waits(queue: Queue) -> None:
    queue.put(*[draft() for _ in range(5)])
    for jobs, left in ((2, 3), (1, 2), (2, 0)):
        queue.claim(jobs=jobs)

        (group,) = queue.client.xinfo_groups(queue.keys.stream(Priority.NORMAL))

        # Redis 6.2 shows none.
        assert group.get("lag", left) == left


def test_of_two_sleeping_workers_one_wakes_for_each_job(own_queue: Queue) -> None:
    connection = Connection(f"unix://{own_queue.client.get_connection_kwargs()['path']}", name="sleepers")
    woken: dict[str, list[Claim]] = {}

    def sleep(consumer: str) -> None:
        streams = Streams(connection.blocking(LONG_S), own_queue.keys)
        woken[consumer] = streams.wait(consumer, LONG_S, ClaimBudget(jobs=0, rows=0, tokens=0)).claims

    sleepers = [threading.Thread(target=sleep, args=[consumer]) for consumer in ("w1", "w2")]
    for thread in sleepers:
        thread.start()
    eventually(lambda: blocked(own_queue) == 2)

    first = own_queue.put(draft(), priority=Priority.BATCH)
    eventually(lambda: len(woken) == 1)
    assert blocked(own_queue) == 1
    second = own_queue.put(draft(), priority=Priority.REALTIME)
    for thread in sleepers:
        thread.join(LONG_S)

    connection.close()
    assert [ids(claims) for claims in woken.values()] == [[job.id] for job in first + second]


def test_after_a_service_was_used_every_key_expires_but_streams_specification_and_dead_letters(queue: Queue) -> None:
    for priority in PRIORITIES:
        queue.put(draft(), draft(client=""), priority=priority)
    queue.lease.beat("w1", {"state": "ready"}, [])
    claims = queue.claim("w1").claims
    queue.settle(claims[:-2])
    queue.settle(claims[-2:-1], bury="max_attempts")
    queue.lease.reclaim()
    queue.lease.release("w1", started=names(claims[-1:]), gone=True)
    queue.settle(queue.claim("w2").claims)
    queue.lease.beat("w2", {}, [])
    queue.put(draft())

    keys = [key.decode() for key in queue.client.scan_iter(f"*{{{queue.keys.service}}}*", count=1000)]

    kept = {*queue.keys.streams(), queue.keys.spec(), queue.keys.dead(), queue.keys.bell()}
    assert {key for key in keys if queue.client.pttl(key) == -1} == kept
    assert len(keys) > len(kept) + 10


def errors_read(queue: Queue) -> list[MillstreamError | None]:
    """The errors among a client's unread replies; those that say x are answers."""
    return [decode_reply(reply).error for _, reply in queue.replies() if not reply.startswith(b"x")]


def test_a_client_that_leaves_too_much_unread_gets_a_small_error_for_each_further_job(queue: Queue) -> None:
    bounded = Streams(queue.client, queue.keys, unread_bytes=1_000_000)
    queue.put(*[draft() for _ in range(60)])
    claims = queue.claim().claims

    settled = [bounded.settle([Settlement(claim.address, b"x" * 100_000)])[0] for claim in claims]

    # Up to 16 are written without asking how long they are.
    assert settled == ["answered"] * 17 + ["unread"] * 43
    assert {type(error) for error in errors_read(queue)} == {ReaderTooSlow}
    assert len(errors_read(queue)) == 43
    assert (queue.depth(), queue.dead_letters()) == (0, [])


@pytest.mark.parametrize(("size", "errors"), [(100_000, 4096 - 17), (300, 1300)])
def test_a_reply_stream_nobody_reads_is_bounded_with_its_errors_and_then_jobs_are_buried(
    queue: Queue, size: int, errors: int
) -> None:
    bounded = Streams(queue.client, queue.keys, unread_bytes=1_700_000)
    queue.open(max_queue_size=10_000)

    settled = []
    while "unwritable" not in settled:
        queue.put(*[draft() for _ in range(100)])
        claims = queue.claim(rows=1000).claims
        settled += bounded.settle([Settlement(claim.address, b"x" * size) for claim in claims])
        assert len(settled) < 20_000

    assert settled.count("unread") <= errors + 200
    held = queue.client.memory_usage(queue.keys.reply(CALLER), samples=0)
    assert held is not None
    assert held < 2 * 1_700_000
    assert {letter[b"reason"] for letter in queue.dead_letters()} == {b"reply_unwritable"}
    assert queue.depth() == 0


def test_an_answer_larger_than_a_reply_may_be_is_told_and_never_sent(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_REPLY_BYTES", 1000)
    large, small = queue.hold("w1", draft(), draft(client=""))

    assert queue.settle([large, small], b"x" * 1001) == ["answered"] * 2

    assert [type(error) for error in errors_read(queue)] == [ReplyTooLarge]
    # A detached job of an older client, whose result is a key of its own.
    result = queue.client.get(queue.keys.result(small.address.job_id))
    assert isinstance(result, bytes)
    assert isinstance(decode_reply(result).error, ReplyTooLarge)


def counted(queue: Queue, command: str) -> int:
    """How often the server ran `command`, by scripts too."""
    stats = queue.client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def test_a_reclaim_pass_looks_at_those_who_hold_something_and_at_the_dead_alone(queue: Queue) -> None:
    queue.hold("w1", draft())
    for worker in range(200):
        queue.lease.beat(f"idle{worker}", {}, [])
        queue.client.xgroup_createconsumer(queue.keys.stream(Priority.NORMAL), GROUP, f"idle{worker}")
    queue.passed(1000)
    before = counted(queue, "zscore")

    assert queue.reclaim() == ("done", 0)

    assert counted(queue, "zscore") - before <= 1
    assert len(queue.client.xinfo_consumers(queue.keys.stream(Priority.NORMAL), GROUP)) == 201


def test_a_beat_reads_no_marks_but_those_of_what_its_worker_holds(queue: Queue) -> None:
    claims = queue.hold("w1", draft())
    queue.client.zadd(queue.keys.cancelled(), {f"2:1-{at}": queue.now() for at in range(1000)})
    queue.client.pexpire(queue.keys.cancelled(), 60_000)
    before = counted(queue, "zrange")

    assert queue.lease.beat("w1", {}, names(claims)).cancelled == []

    assert counted(queue, "zrange") == before


def test_a_client_that_reads_is_answered_again(queue: Queue) -> None:
    bounded = Streams(queue.client, queue.keys, unread_bytes=1_000_000)
    queue.put(*[draft() for _ in range(30)])
    claims = queue.claim().claims
    for claim in claims[:20]:
        bounded.settle([Settlement(claim.address, b"x" * 100_000)])

    queue.client.xtrim(queue.keys.reply(CALLER), maxlen=0)

    assert bounded.settle([Settlement(claims[20].address, b"reply")]) == ["answered"]


@pytest.mark.parametrize("job", [(1, 1), (2, 3), (3, 10), (9, 90)])
def test_a_claim_copies_one_job_that_has_no_room_whatever_the_last_one_was_like(
    queue: Queue, job: tuple[int, int]
) -> None:
    queue.put(*[draft(rows=3, tokens=10) for _ in range(6)])

    with queue.client.monitor() as monitor:  # type: ignore[no-untyped-call]
        claimed = queue.streams.claim("w1", ClaimBudget(100, 5, 1_000, job=job))
        queue.client.echo("over")
        commands = (str(each["command"]) for each in monitor.listen())
        said = list(takewhile(lambda command: command != "ECHO over", commands))

    assert (len(claimed.claims), claimed.blocked) == (1, 2)
    stream = queue.keys.stream(Priority.NORMAL)
    pages = [command for command in said if command.startswith(f"XRANGE {stream}")]
    assert [int(page.rpartition(" ")[2]) for page in pages] == [1, 1]
