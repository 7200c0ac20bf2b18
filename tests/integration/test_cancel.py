"""Calls that nobody wants any more: what waits is not run, what runs is ended, and nothing slips in behind."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest
from bystander import Bystander
from e2e.watch import Watch
from support import eventually
from workers import LONG_S, remove, spec, working

from millstream.broker.contract.errors import BrokerUnavailable, Cancelled, MillstreamError, PartialFailure, QueueFull
from millstream.broker.contract.job import Json
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client


@pytest.fixture(scope="module")
def slow(server: EmbeddedServer) -> Iterator[str]:
    """A service whose only worker takes half a second for each row."""
    name = f"test-slow-{uuid.uuid4().hex[:8]}"
    with working(server.url, spec(name, forward_s=0.5, batch_size=1)):
        yield name
    remove(server.url, name)


def counted(watch: Watch, field: str) -> int:
    return sum(watch.counted(field).values())


def test_jobs_whose_awaiting_tasks_are_cancelled_are_not_run(
    server: EmbeddedServer, connection: Connection, slow: str
) -> None:
    watch = Watch(connection, ServiceKeys(slow))
    before = counted(watch, "rows")

    async def call(client: AsyncClient, row: str) -> None:
        await (await client.submit(slow, [row]))

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            wanted = await client.submit(slow, ["wanted"])
            await asyncio.to_thread(eventually, lambda: watch.held())
            tasks = [asyncio.create_task(call(client, str(n))) for n in range(50)]
            # On a busy machine a few may have run before the last one came.
            await asyncio.to_thread(eventually, lambda: watch.depth() >= 45)
            for task in tasks:
                task.cancel()
            assert all(
                isinstance(each, asyncio.CancelledError)
                for each in await asyncio.gather(*tasks, return_exceptions=True)
            )
            assert await wanted == ["wanted"]
            await asyncio.to_thread(eventually, lambda: watch.depth() == 0)
            assert await (await client.submit(slow, ["last"])) == ["last"]

    asyncio.run(run())
    eventually(lambda: counted(watch, "rows") - before >= 2)
    # A few may have run: the worker prepares ahead, and hears of a cancellation at its next beat.
    assert counted(watch, "rows") - before <= 2 + 4 + 6


def test_a_job_that_waits_is_cancelled_and_one_that_was_taken_is_not(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    taken = client.submit(service.name, ["taken"])
    service.claim(1)
    waiting = client.submit(service.name, ["waiting"])

    assert waiting.cancel()
    assert not taken.cancel()

    for handle in (waiting, taken):
        with pytest.raises(Cancelled):
            handle.result(0)
    assert service.queue.depth() == 1


def test_what_is_over_cannot_be_cancelled(client: Client, echo: str) -> None:
    handle = client.submit(echo, ["a"])
    assert handle.result(LONG_S) == ["a"]

    assert not handle.cancel()

    assert handle.result() == ["a"]
    assert not client.submit(echo, []).cancel()


def test_a_call_that_was_answered_in_part_keeps_what_it_has(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    handle = client.submit(service.name, ["a", "b", "c"])
    service.answer(service.claim_one())
    eventually(lambda: handle.rows_done == 1)

    assert not handle.cancel(), "one of its jobs was run"

    with pytest.raises(PartialFailure) as caught:
        handle.result(0)
    assert sorted(map(str, caught.value.results)) == ["None", "None", "a"]
    eventually(lambda: service.queue.depth() == 0)


def test_a_call_larger_than_its_window_is_cancelled_whole(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1)
    handle = client.submit(service.name, [str(n) for n in range(500)])
    eventually(lambda: service.queue.depth() > 0)

    assert handle.cancel()

    assert service.queue.depth() == 0
    assert handle.rows_done == 500


def test_jobs_that_wait_for_room_are_withdrawn(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1, max_queue_size=1)
    first = client.submit(service.name, ["first"])
    eventually(lambda: service.queue.depth() == 1)
    crowded = [client.submit(service.name, [str(n)]) for n in range(20)]

    assert all(handle.cancel() for handle in crowded)

    service.answer(service.claim_one())
    assert first.result(LONG_S) == ["first"]
    last = client.submit(service.name, ["last"])
    claim = service.claim_one()
    assert claim.address.job_id == last.id


def test_calls_cancelled_while_they_are_being_sent_leave_nothing_in_the_queue(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1, max_queue_size=40)
    rows: list[Json] = [str(n) for n in range(30)]

    def call() -> None:
        for _ in range(20):
            client.submit(service.name, rows).cancel_soon()

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert client.submit(service.name, ["behind them all"]).cancel()
    assert service.queue.depth() == 0


def test_the_rest_of_a_call_is_cancelled_while_answers_keep_it_sending(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            service.answer(*service.queue.claim("bystander", jobs=1).claims)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(30):
            handle = client.submit(service.name, [str(n) for n in range(100)])
            eventually(lambda handle=handle: handle.rows_done > 10)  # type: ignore[misc]
            handle.cancel()
    finally:
        over.set()
        worker.join(LONG_S)

    assert client.submit(service.name, ["behind them all"]).cancel()
    assert service.queue.depth() == 0


def test_cancelling_needs_an_open_client(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    client = Client(server.url)
    handle = client.submit(service.name, ["a"])
    client.close()

    assert not handle.cancel()
    handle.cancel_soon()
    with pytest.raises(BrokerUnavailable):
        handle.result(0)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_call_without_patience_is_accepted_whole_or_not(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1, max_queue_size=12)
    client.submit(service.name, [str(n) for n in range(3)])
    eventually(lambda: service.queue.depth() == 3)
    client.submit(service.name, [str(n) for n in range(3)])
    eventually(lambda: service.queue.depth() == 6)
    client.submit(service.name, [str(n) for n in range(3)])
    client.submit(service.name, ["10"])
    eventually(lambda: service.queue.depth() == 10)

    with pytest.raises(QueueFull) as caught:
        client.submit(service.name, ["a", "b", "c"], wait=False).result(LONG_S)

    assert caught.value.retry_after
    assert service.queue.depth() == 10
    fitting = client.submit(service.name, ["a", "b"], wait=False)
    eventually(lambda: service.queue.depth() == 12)
    assert not fitting.done()


def test_calls_that_wait_for_room_hold_up_nobody_elses(
    client: Client, bystander: Callable[..., Bystander], echo: str
) -> None:
    full = bystander(batch_size=1, max_queue_size=1)
    crowded = [client.submit(full.name, [str(n)]) for n in range(500)]

    for n in range(50):
        assert client.submit(echo, [str(n)], timeout=5.0).result() == [str(n)]

    assert not any(handle.done() for handle in crowded)
    for handle in crowded:
        handle.cancel_soon()


def test_closing_a_client_ends_every_call_at_once(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=1, max_queue_size=2)
    client = Client(server.url)
    errors: list[BaseException] = []
    handles = [client.submit(service.name, [str(n), "second"]) for n in range(20)]

    def wait(n: int) -> None:
        try:
            handles[n].result()
        except MillstreamError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=[n]) for n in range(20)]
    for thread in threads:
        thread.start()
    client.close()
    for thread in threads:
        thread.join(2.0)

    assert [type(error) for error in errors] == [BrokerUnavailable] * 20


def test_closing_an_async_client_ends_every_await_at_once(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()

    async def run() -> None:
        client = AsyncClient(server.url)
        handles = [await client.submit(service.name, [str(n)]) for n in range(20)]
        waiting = asyncio.gather(*handles, return_exceptions=True)
        await asyncio.sleep(0)
        await client.close()
        outcomes = await asyncio.wait_for(waiting, 2.0)
        assert [type(each) for each in outcomes] == [BrokerUnavailable] * 20

    asyncio.run(run())


def test_a_closed_client_starts_no_thread_again(server: EmbeddedServer, echo: str) -> None:
    # Clients of other tests may not be collected yet.
    before = set(threading.enumerate())
    client = Client(server.url)
    client.close()

    with pytest.raises(BrokerUnavailable):
        client.submit(echo, ["a"]).result(LONG_S)

    started = set(threading.enumerate()) - before
    assert not [thread.name for thread in started if thread.name.startswith("millstream-")]
