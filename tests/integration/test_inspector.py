"""What the inspector says of queues and workers, on a real server and without a worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import pytest
from contracts.queue import Queue, draft

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.entry_codec import FIELDS, OPTIONAL
from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.contract.keys import ServiceKeys, services_key
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.stream_types import Group
from millstream.broker.transport.connection import Connection

STATUS: dict[str, str | int] = {
    "state": "ready",
    "host": "mill",
    "pid": 42,
    "device": "cpu",
    "fingerprint": "weights float32 384",
    "jobs": 3,
    "rows": 12,
    "forwards": 3,
    "tokens": 100,
    "padded": 110,
    "errors": 1,
    "busy_ms": 70,
    "age_ms": 7_000,
    "running": 2,
    "running_ms": 1_500,
    "past": "was killed by SIGKILL",
    "batch_tokens": 1_024,
    "text_tokens": 512,
    "threads": 2,
    "cut_rows": 2,
    "cut_arrival": 1,
}

View = Callable[[], ServiceView]


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open()
    return opened


@pytest.fixture
def inspector(connection: Connection) -> Inspector:
    return Inspector(connection)


@pytest.fixture
def view(inspector: Inspector, service: str) -> View:
    return lambda: inspector.services([service])[0]


def chinese() -> Draft:
    return Draft(os.urandom(16).hex(), "embed", 1, 4, encode_inputs(["水车转动 万物不息"], {}))


def test_jobs_wait_by_priority_until_they_are_claimed(queue: Queue, view: View) -> None:
    queue.put(draft(), priority=Priority.REALTIME)
    queue.put(draft(), draft(), draft())
    queue.claim("w1", jobs=2)

    seen = view()

    assert seen.waiting == {Priority.REALTIME: 0, Priority.NORMAL: 2, Priority.BATCH: 0}
    assert (seen.in_flight, seen.returned, seen.depth) == (2, 0, 2)


def test_what_a_dead_worker_gave_back_is_returned_and_not_in_flight(queue: Queue, view: View) -> None:
    queue.hold("dead", draft(), draft())
    queue.hold("alive", draft())

    queue.lease.release("dead", gone=True)

    seen = view()
    assert (seen.returned, seen.in_flight, seen.depth) == (2, 1, 2)


def test_a_settled_job_is_nowhere_and_a_buried_one_is_a_dead_letter(queue: Queue, view: View) -> None:
    first, second = queue.hold("w1", draft(), draft())

    queue.settle([first])
    queue.settle([second], bury="poison")

    seen = view()
    assert (seen.depth, seen.in_flight, seen.dead_letters, seen.oldest_ms) == (0, 0, 1, None)


def test_the_oldest_age_is_that_of_the_oldest_unsettled_job_by_the_servers_clock(queue: Queue, view: View) -> None:
    at = queue.now() - 90_000
    queue.put_raw({b"at": str(at).encode()}, Priority.BATCH)
    queue.put(draft(), priority=Priority.REALTIME)

    oldest = view().oldest_ms

    assert oldest is not None
    assert 90_000 <= oldest <= queue.now() - at


def test_an_entry_that_does_not_say_when_it_came_has_no_age(queue: Queue, view: View) -> None:
    queue.put_raw({b"at": b"yesterday"})

    assert view().oldest_ms is None
    assert view().waiting[Priority.NORMAL] == 1


def test_a_live_worker_shows_what_it_said_at_its_last_beat(queue: Queue, view: View) -> None:
    queue.lease.beat("w1", STATUS, [])

    (worker,) = view().workers

    assert (worker.consumer, worker.state, worker.host, worker.pid, worker.device) == ("w1", "ready", "mill", 42, "cpu")
    assert (worker.jobs, worker.rows, worker.forwards, worker.tokens, worker.padded) == (3, 12, 3, 100, 110)
    assert (worker.errors, worker.busy_ms, worker.age_ms) == (1, 70, 7_000)
    assert (worker.running, worker.running_ms, worker.past) == (2, 1_500, "was killed by SIGKILL")
    assert (worker.batch_tokens, worker.text_tokens, worker.threads) == (1_024, 512, 2)
    assert worker.cuts == {"rows": 2, "arrival": 1}
    assert worker.beat_age_ms < 5_000


def test_a_workers_rates_are_over_its_life(queue: Queue, view: View) -> None:
    queue.lease.beat("w1", {**STATUS, "busy_ms": 700}, [])
    queue.lease.beat("w2", {"state": "ready"}, [])

    old, new = sorted(view().workers, key=lambda worker: worker.consumer)

    assert (round(old.rows_per_s or 0.0, 3), old.busy, old.padding) == (1.714, 0.1, 1.1)
    assert (new.rows_per_s, new.busy, new.padding) == (None, None, None)


def test_mean_batch_and_padding_are_over_all_live_workers(queue: Queue, view: View) -> None:
    queue.lease.beat("w1", STATUS, [])
    queue.lease.beat("w2", {**STATUS, "rows": 48, "forwards": 1, "tokens": 300, "padded": 330}, [])
    queue.lease.beat("new", {**STATUS, "rows": 0, "forwards": 0, "tokens": 0, "padded": 0}, [])

    seen = view()

    assert (seen.forwards, seen.rows_per_forward) == (4, 15.0)
    assert seen.padding == pytest.approx(1.1)
    assert seen.cuts == {"rows": 6, "arrival": 3}


def test_without_a_forward_there_is_no_mean_batch_and_no_padding(queue: Queue, view: View) -> None:
    queue.lease.beat("w1", {"state": "ready"}, [])

    assert (view().rows_per_forward, view().padding) == (None, None)


def test_a_worker_that_stopped_beating_is_not_listed(queue: Queue, view: View) -> None:
    queue.lease.beat("w1", STATUS, [])
    queue.lease.beat("w2", STATUS, [])

    queue.silence("w1")

    assert [worker.consumer for worker in view().workers] == ["w2"]


def test_a_worker_whose_hash_is_gone_or_strange_is_listed_all_the_same(queue: Queue, view: View) -> None:
    queue.lease.beat("bare", {}, [])
    queue.lease.beat("odd", {**STATUS, "pid": "many", "rows": "-1"}, [])
    queue.client.delete(queue.keys.worker("bare"))

    bare, odd = sorted(view().workers, key=lambda worker: worker.consumer)

    assert (bare.state, bare.pid, bare.rows) == ("unknown", 0, 0)
    assert (odd.state, odd.pid, odd.rows) == ("ready", 0, 0)


def test_a_service_whose_streams_are_gone_is_empty(queue: Queue, view: View) -> None:
    queue.client.delete(*queue.keys.streams())

    seen = view()

    assert (seen.depth, seen.in_flight, seen.returned, seen.oldest_ms, seen.workers) == (0, 0, 0, None, [])


def test_without_names_it_shows_every_registered_service(inspector: Inspector, queue: Queue, service: str) -> None:
    queue.client.sadd(services_key(), service)

    try:
        assert service in [view.name for view in inspector.services()]
    finally:
        queue.client.srem(services_key(), service)


def test_any_number_of_services_takes_two_round_trips(
    inspector: Inspector, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.lease.beat("w1", STATUS, [])
    trips: list[str] = []

    def counted(owner: type, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            trips.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(type(queue.client), "execute_command")
    counted(type(queue.client.pipeline()), "execute")

    inspector.services([queue.keys.service] * 5)

    assert trips == ["execute", "execute"]


def test_peek_shows_the_oldest_waiting_jobs_as_they_lie_in_the_stream(queue: Queue, inspector: Inspector) -> None:
    queue.put(chinese(), chinese(), chinese())

    found = inspector.peek(queue.keys.service, Priority.NORMAL, count=2)

    lying = cast(list[tuple[bytes, object]], queue.client.xrange(found.stream, count=2))
    assert found.after == "0-0"
    assert [entry.id.encode() for entry in found.entries] == [entry_id for entry_id, _ in lying]
    assert tuple(found.entries[0].fields) == tuple(name for name in FIELDS if name not in OPTIONAL)
    assert found.entries[0].fields["body"] == '{"inputs":["水车转动 万物不息"]}'


def test_peek_leaves_out_what_workers_hold_and_starts_with_what_they_gave_back(
    queue: Queue, inspector: Inspector
) -> None:
    returned, held, fresh = draft(), draft(), draft()
    queue.hold("dead", returned)
    (claim,) = queue.hold("w1", held)
    queue.put(fresh)
    queue.lease.release("dead", gone=True)

    found = inspector.peek(queue.keys.service, Priority.NORMAL)

    assert [entry.fields["id"] for entry in found.entries] == [returned.id, fresh.id]
    assert found.after == claim.address.entry


def test_peek_shows_an_entry_that_nobody_could_decode(queue: Queue, inspector: Inspector) -> None:
    queue.put_raw({b"body": b"\xff\x00 half", b"v": b"9"}, Priority.REALTIME)

    (entry,) = inspector.peek(queue.keys.service, Priority.REALTIME).entries

    assert entry.fields == {"body": "\\xff\x00 half", "v": "9"}


def test_peek_finds_nothing_where_nothing_is(inspector: Inspector, service: str) -> None:
    assert inspector.peek(service, Priority.BATCH).entries == []


def test_a_server_that_is_away_is_our_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    away = Connection(f"unix://{tmp_path_factory.mktemp('away')}/no.sock")

    with pytest.raises(BrokerUnavailable):
        Inspector(away).services(["any"])
    with pytest.raises(BrokerUnavailable):
        Inspector(away).peek("any", Priority.NORMAL)


def test_jobs_turned_away_are_counted_by_reason(queue: Queue, view: View) -> None:
    queue.client.hset(queue.keys.spec(), mapping={"max_queue_size": 1})
    queue.put(draft())
    assert view().refused == {}

    queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])

    assert view().refused == {"queue_full": 1}
