"""A pause is felt by workers within a second, loses nothing and tells callers who waited in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from bystander import Bystander
from contracts.queue import Queue, draft
from support import eventually
from workers import LONG_S, spec, working

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import Cancelled, DeadlineExceeded, NoWorkers, ServicePaused
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.keys import GROUP, RETURNED, ServiceKeys
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.inspector import Inspector, ServiceView, WorkerView
from millstream.broker.queue.pause import pause, resume
from millstream.broker.queue.streams import Streams
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker.context import Context
from millstream.worker.intake.claimer import Claimer, Policy
from millstream.worker.intake.claimer import Queue as Way
from millstream.worker.intake.intake import Intake
from millstream.worker.models.echo import EchoModel
from millstream.worker.scheduling.batch_delay import BatchDelay
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.fair_share import FairShare
from millstream.worker.window import Window

FELT_S = 1.0


@dataclass(frozen=True)
class Mill:
    """An echo service with one worker process."""

    connection: Connection
    queue: Queue

    def view(self) -> ServiceView:
        return Inspector(self.connection).services([self.queue.keys.service])[0]

    def worker(self) -> WorkerView:
        (worker,) = self.view().workers
        return worker

    def asleep(self) -> bool:
        """Whether the worker's connection is blocked in a read."""
        clients = self.connection.client.client_list()
        return any("b" in client["flags"] and client["cmd"] == "xreadgroup" for client in clients)

    def pause(self) -> tuple[int, int]:
        """Pause; jobs on the queue at this very instant, and how many of them are in the worker's hand."""
        pipe = self.connection.client.pipeline(transaction=True)
        pause(pipe, self.queue.keys)
        for stream in self.queue.keys.streams():
            pipe.xlen(stream)
            pipe.xpending(stream, GROUP)
        _, *answers = pipe.execute()
        return sum(answers[0::2]), sum(answer["pending"] for answer in answers[1::2])

    def resume(self) -> None:
        assert resume(self.connection.client, self.queue.keys)


@contextmanager
def milling(server: EmbeddedServer, connection: Connection, wanted: ServiceSpec) -> Iterator[Mill]:
    with working(server.url, wanted):
        mill = Mill(connection, Queue(connection.client, ServiceKeys(wanted.name)))
        eventually(lambda: mill.view().workers, within_s=LONG_S)
        try:
            yield mill
        finally:
            resume(connection.client, mill.queue.keys)
            connection.client.srem("ms:services", wanted.name)


def test_a_paused_service_starts_nothing_not_even_what_is_just_being_delivered(
    server: EmbeddedServer, connection: Connection, service: str
) -> None:
    with milling(server, connection, spec(service)) as mill:
        eventually(mill.asleep)
        mill.pause()
        mill.queue.put(draft())

        eventually(lambda: len(mill.queue.held_by(RETURNED)) == 1, within_s=FELT_S)
        mill.queue.put(*[draft() for _ in range(9)])
        eventually(lambda: mill.worker().state == "paused")
        said = mill.worker().age_ms
        eventually(lambda: mill.worker().age_ms > said)

        assert (mill.view().depth, mill.view().in_flight, mill.view().paused is not None) == (10, 0, True)
        assert (mill.worker().forwards, mill.worker().jobs, mill.queue.replies()) == (0, 0, [])
        assert not mill.asleep(), "it would be given a job that it only hands back"

        mill.resume()

        eventually(lambda: len(mill.queue.replies()) == 10, within_s=FELT_S)
        eventually(lambda: mill.worker().jobs == 10)
        assert (mill.worker().errors, mill.queue.dead_letters()) == (0, [])


def test_what_a_worker_holds_when_the_pause_begins_is_finished_and_nothing_else(
    server: EmbeddedServer, connection: Connection, service: str
) -> None:
    with milling(server, connection, spec(service, forward_s=0.02, batch_size=1)) as mill:
        mill.queue.put(*[draft() for _ in range(200)])
        eventually(mill.queue.replies)

        on_the_queue, in_hand = mill.pause()

        eventually(lambda: not mill.view().in_flight)
        left = on_the_queue - in_hand
        assert in_hand > 0
        assert 0 < left == mill.view().depth
        assert len(mill.queue.replies()) == 200 - left

        mill.resume()

        eventually(lambda: len(mill.queue.replies()) > 200 - left, within_s=FELT_S)
        eventually(lambda: len(mill.queue.replies()) == 200)


def test_a_pause_ends_by_itself_where_it_was_given_a_time(
    server: EmbeddedServer, connection: Connection, service: str
) -> None:
    with milling(server, connection, spec(service)) as mill:
        pause(connection.client, mill.queue.keys, for_s=0.3)
        mill.queue.put(draft())

        eventually(mill.queue.replies, within_s=0.3 + FELT_S)


class Counting(Streams):
    """Counts its claims."""

    claims = 0

    def claim(self, consumer: str, limit: ClaimBudget) -> Claimed:
        self.claims += 1
        return super().claim(consumer, limit)


def test_the_worker_of_a_paused_service_looks_at_most_four_times_a_second(connection: Connection, service: str) -> None:
    queue = Queue(connection.client, ServiceKeys(service))
    queue.open()
    queue.put(draft())
    pause(connection.client, queue.keys)
    streams = Counting(connection.client, queue.keys)
    context = Context("w1", Window(Budget(8, 1_000)))
    policy = Policy(BatchDelay(0.0), {}, FairShare(dict.fromkeys(PRIORITIES, 0.3), 16))
    claimer = Claimer(context, Way(streams, queue.lease), Intake(EchoModel(), 3), policy, lambda finished: None)

    began = time.monotonic()
    claimer.start()
    eventually(lambda: streams.claims >= 4)
    seconds = time.monotonic() - began
    context.shutdown.drain()
    claimer.join()

    assert streams.claims <= 4 * seconds + 1
    assert (claimer.paused, queue.held_by("w1")) == (True, [])


# -- what callers are told


def test_a_call_that_ends_in_a_pause_says_so(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    service.live()
    pause(service.queue.client, service.queue.keys)

    with pytest.raises(DeadlineExceeded, match=f"paused.*millstream queue resume {service.name}"):
        client.submit(service.name, ["a"], timeout=0.1).result()


def test_without_a_worker_it_says_both(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    pause(service.queue.client, service.queue.keys)

    with pytest.raises(NoWorkers, match=f"paused.*millstream queue resume {service.name}"):
        client.submit(service.name, ["a"], timeout=0.1).result()


def test_a_service_that_refuses_new_jobs_tells_impatient_callers_and_lets_others_wait(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()
    pause(service.queue.client, service.queue.keys, refusing=True)

    with pytest.raises(ServicePaused) as caught:
        client.submit(service.name, ["a"], wait=False).result(LONG_S)
    patient = client.submit(service.name, ["b"], timeout=LONG_S)
    resume(service.queue.client, service.queue.keys)
    service.answer(*service.claim(1))

    assert caught.value.retry_after
    assert patient.result(LONG_S) == ["b"]


def test_the_callers_of_purged_jobs_are_told_at_once(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    handle = client.submit(service.name, ["a"])
    eventually(lambda: service.queue.depth() == 1)

    assert service.queue.streams.purge() == 1

    with pytest.raises(Cancelled, match="purged"):
        handle.result(LONG_S)
