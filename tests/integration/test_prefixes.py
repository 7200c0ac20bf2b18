"""Two environments on one server, each under its own key prefix: neither ever sees the other."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from contracts.queue import Queue, draft, ids
from workers import spec

from millstream.broker.contract.errors import ConfigError, NoWorkers, UnknownService
from millstream.broker.contract.job import Priority
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

SERVICE = "embed"


class Environment:
    """One prefix, with the service that both of them have."""

    def __init__(self, connection: Connection, prefix: str, batch_size: int) -> None:
        self.prefix = prefix
        self.registry = Registry(connection, prefix)
        self.registry.push([spec(SERVICE, batch_size=batch_size)])
        self.queue = Queue(connection.client, self.registry.keys(SERVICE))
        self._inspector = Inspector(connection, prefix)

    def waiting(self) -> int:
        return len(self._inspector.peek(SERVICE, Priority.NORMAL).entries)

    def view(self) -> ServiceView:
        (view,) = self._inspector.services()
        return view


@pytest.fixture
def blue(connection: Connection) -> Iterator[Environment]:
    yield from environment(connection, "blue", batch_size=8)


@pytest.fixture
def green(connection: Connection) -> Iterator[Environment]:
    yield from environment(connection, "green", batch_size=64)


def environment(connection: Connection, colour: str, *, batch_size: int) -> Iterator[Environment]:
    prefix = f"{colour}-{uuid.uuid4().hex[:8]}"
    yield Environment(connection, prefix, batch_size)
    connection.client.unlink(*connection.client.scan_iter(f"{prefix}:*", count=1000))


def test_the_same_service_has_its_own_settings_in_each(blue: Environment, green: Environment) -> None:
    blue.registry.push([spec("only-blue")])

    assert [each.registry.read(SERVICE).runtime.batch_size for each in (blue, green)] == [8, 64]
    assert (blue.registry.names(), green.registry.names()) == ([SERVICE, "only-blue"], [SERVICE])
    with pytest.raises(UnknownService):
        green.registry.read("only-blue")


def test_weights_of_one_do_not_bind_the_other(blue: Environment, green: Environment) -> None:
    blue.registry.claim_fingerprint(SERVICE, "old weights")

    green.registry.claim_fingerprint(SERVICE, "new weights")

    with pytest.raises(ConfigError, match="runs old weights"):
        blue.registry.claim_fingerprint(SERVICE, "new weights")


def test_a_job_of_one_waits_runs_and_is_answered_there_alone(blue: Environment, green: Environment) -> None:
    (job,) = blue.queue.put(draft())

    assert green.queue.claim("w").claims == []
    assert (blue.view().depth, green.view().depth) == (1, 0)
    assert (blue.waiting(), green.waiting()) == (1, 0)
    claims = blue.queue.claim("w").claims
    assert green.queue.settle(claims) == ["late"]
    assert blue.queue.settle(claims) == ["answered"]
    assert [job_id for job_id, _ in blue.queue.replies()] == [job.id]
    assert green.queue.replies() == []


def test_a_cancellation_in_one_leaves_the_same_job_id_of_the_other(blue: Environment, green: Environment) -> None:
    job = draft()
    blue.queue.put(job)
    green.queue.put(job)

    green.queue.streams.cancel([job.id], job.client)

    assert ids(blue.queue.claim("w").claims) == [job.id]
    assert green.queue.claim("w").claims == []


def test_a_worker_lives_in_one_alone(blue: Environment, green: Environment) -> None:
    blue.queue.lease.beat("w1", {"state": "ready"}, [])

    assert [worker.consumer for worker in blue.view().workers] == ["w1"]
    assert green.view().workers == []
    assert (blue.queue.lease.live_workers(), green.queue.lease.live_workers()) == (1, 0)


def test_what_is_released_or_reclaimed_in_one_stays_held_in_the_other(blue: Environment, green: Environment) -> None:
    for each in (blue, green):
        held = each.queue.hold("w1", draft(), draft())
        each.queue.age("w1", held)
        each.queue.silence("w1")
        each.queue.passed(2_000)

    assert green.queue.lease.release("w1", gone=True) == 2
    assert (green.view().returned, blue.view().returned) == (2, 0)
    assert len(blue.queue.held_by("w1")) == 2
    assert green.queue.lease.reclaim() == 0
    assert blue.queue.lease.reclaim() == 2


def test_a_dead_letter_and_a_full_queue_of_one_are_not_the_others(blue: Environment, green: Environment) -> None:
    blue.registry.push([spec(SERVICE, batch_size=8, max_queue_size=1)], replace=True)
    blue.queue.settle(blue.queue.hold("w1", draft()), bury="poison")
    blue.queue.put(draft())

    green.queue.put(draft(), draft(), draft())

    assert (blue.view().dead_letters, green.view().dead_letters) == (1, 0)
    assert (blue.view().depth, green.view().depth) == (1, 3)


def test_a_clients_call_reaches_its_own_environment_alone(
    server: EmbeddedServer, blue: Environment, green: Environment
) -> None:
    green.queue.lease.beat("green's", {}, [])

    with Client(server.url, prefix=blue.prefix) as client, pytest.raises(NoWorkers):
        client.submit(SERVICE, ["blue"], timeout=1.0).result()

    assert green.queue.claim("green's").claims == []


def test_no_key_is_outside_the_prefixes(server: EmbeddedServer, connection: Connection, blue: Environment) -> None:
    before = set(connection.client.scan_iter(count=1000))

    blue.queue.settle(blue.queue.hold("w1", draft(), draft()))
    blue.queue.settle(blue.queue.hold("w1", draft()), bury="poison")
    blue.queue.put(draft())
    blue.queue.lease.reclaim()

    new = set(connection.client.scan_iter(count=1000)) - before
    assert new
    assert {key for key in new if not key.startswith(f"{blue.prefix}:".encode())} == set()
