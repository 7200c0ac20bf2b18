"""Thousands of calls awaited at once, over a handful of connections and in bounded memory."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bystander import Bystander
from support import eventually
from workers import LONG_S

from millstream.broker.contract.errors import Cancelled, DeadlineExceeded, MillstreamError, NoWorkers, QueueFull
from millstream.broker.contract.job import Json
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client
from millstream.client.async_calls import AsyncCalls
from millstream.client.async_handle import AsyncHandle
from millstream.client.call_options import CallOptions
from millstream.client.calls import Calls
from millstream.client.handle import Handle

CONNECTIONS = 3
"""Of one client to one service: for sending, for reading replies, for reading the registry."""

MANY = "100000" if os.environ.get("MILLSTREAM_LONG") else "20000"
LOAD = Path(__file__).with_name("load.py")


def clients_connected(connection: Connection) -> int:
    """Sockets that clients of any process have open."""
    return sum(1 for each in connection.client.client_list() if each["name"] == "millstream-client")


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(eventually, condition)


def test_two_thousand_awaits_in_one_loop_are_answered_over_a_handful_of_connections(
    server: EmbeddedServer, connection: Connection, echo: str
) -> None:
    before = clients_connected(connection)

    async def call(client: AsyncClient, n: int) -> bool:
        handle = await client.submit(echo, [f"text {n}"])
        return await handle == [f"text {n}"]

    async def run() -> tuple[list[bool], int]:
        async with AsyncClient(server.url) as client:
            right = await asyncio.gather(*(call(client, n) for n in range(2_000)))
            return right, clients_connected(connection)

    right, connected = asyncio.run(run())
    assert all(right)
    assert connected - before <= CONNECTIONS


def test_two_hundred_threads_share_a_handful_of_connections(
    server: EmbeddedServer, connection: Connection, echo: str
) -> None:
    before = clients_connected(connection)
    start = threading.Barrier(200)
    wrong: list[object] = []

    def call(client: Client, thread: int) -> None:
        start.wait(LONG_S)
        for turn in range(5):
            rows: list[Json] = [f"{thread} {turn}"]
            if (answer := client.submit(echo, rows).result(LONG_S)) != rows:
                wrong.append(answer)

    with Client(server.url) as client:
        threads = [threading.Thread(target=call, args=[client, n]) for n in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)

        assert wrong == []
        assert clients_connected(connection) - before <= CONNECTIONS


def test_calls_that_end_together_ask_the_server_why_over_one_connection(
    server: EmbeddedServer, connection: Connection, bystander: Callable[..., Bystander]
) -> None:
    before = clients_connected(connection)
    service = bystander(total_timeout=0.3)
    errors: list[BaseException] = []

    def call(client: Client) -> None:
        try:
            client.submit(service.name, ["a"]).result()
        except MillstreamError as error:
            errors.append(error)

    with Client(server.url) as client:
        threads = [threading.Thread(target=call, args=[client]) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)

        assert [type(error) for error in errors] == [NoWorkers] * 100
        assert clients_connected(connection) - before <= CONNECTIONS


@pytest.mark.timeout(300)
def test_tens_of_thousands_of_calls_leave_no_memory_behind(server: EmbeddedServer, echo: str) -> None:
    done = subprocess.run(
        [sys.executable, LOAD, server.url, echo, MANY], capture_output=True, text=True, timeout=280, check=True
    )

    measured = json.loads(done.stdout)
    assert measured["wrong"] == 0
    assert measured["grown_mb"] < 30


def test_an_await_may_be_shorter_than_its_call(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander()

    async def run() -> object:
        async with AsyncClient(server.url) as client:
            handle = await client.submit(service.name, ["a"])
            with pytest.raises(DeadlineExceeded):
                await handle.result(timeout=0.05)
            service.answer(*await asyncio.to_thread(service.claim, 1))
            return await handle.result(LONG_S)

    assert asyncio.run(run()) == ["a"]


def test_an_awaited_call_whose_time_is_over_says_why(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(total_timeout=0.1)

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            handles = [await client.submit(service.name, ["a"]) for _ in range(20)]
            outcomes = await asyncio.gather(*handles, return_exceptions=True)
            assert [type(each) for each in outcomes] == [NoWorkers] * 20

    asyncio.run(run())


def test_a_full_queue_refuses_an_impatient_await(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander(max_queue_size=1)

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            await client.submit(service.name, ["first"])
            await until(lambda: service.queue.depth() == 1)
            with pytest.raises(QueueFull):
                await (await client.submit(service.name, ["second"], wait=False))

    asyncio.run(run())


def test_cancelling_a_task_cancels_the_job_it_awaits(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)

    async def call(client: AsyncClient, rows: list[Json]) -> None:
        await (await client.submit(service.name, rows))

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            unwanted = asyncio.create_task(call(client, ["a", "b", "c"]))
            await until(lambda: service.queue.depth() == 3)
            kept = await client.submit(service.name, ["d"])
            await until(lambda: service.queue.depth() == 4)

            unwanted.cancel()
            with pytest.raises(asyncio.CancelledError):
                await unwanted

            await until(lambda: service.queue.depth() == 1)
            service.answer(*await asyncio.to_thread(service.claim, 1))
            assert await kept == ["d"]

    asyncio.run(run())


def test_a_call_that_several_tasks_await_is_answered_to_each(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()

    async def run() -> object:
        async with AsyncClient(server.url) as client:
            handle = await client.submit(service.name, ["a"])
            waiting = asyncio.gather(*(handle.result() for _ in range(5)))
            service.answer(*await asyncio.to_thread(service.claim, 1))
            return await waiting

    assert asyncio.run(run()) == [["a"]] * 5


def test_a_cancelled_call_says_so_to_whoever_else_waits(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            handle = await client.submit(service.name, ["a"])
            waiting = asyncio.create_task(handle.result())
            await until(lambda: service.queue.depth() == 1)
            assert await handle.cancel()
            with pytest.raises(Cancelled):
                await waiting

    asyncio.run(run())


def test_a_late_answer_does_not_keep_an_event_loop_that_was_closed_while_it_waited(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()
    client, loop = AsyncClient(server.url), asyncio.new_event_loop()

    async def begin() -> AsyncHandle:
        handle = await client.submit(service.name, ["a"])
        waiting.append(asyncio.ensure_future(handle.result()))
        await asyncio.sleep(0)
        return handle

    waiting: list[asyncio.Future[object]] = []
    handle = loop.run_until_complete(begin())
    waiting[0]._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.clear()
    loop.close()
    closed = weakref.ref(loop)
    del loop

    service.answer(service.claim_one())
    eventually(lambda: handle.rows_done)
    gc.collect()

    assert closed() is None
    asyncio.run(client.close())


def test_several_event_loops_share_a_client(server: EmbeddedServer, echo: str) -> None:
    client = AsyncClient(server.url)
    answers: list[object] = []

    async def call(text: str) -> None:
        answers.append(await (await client.submit(echo, [text])).result(LONG_S))

    threads = [threading.Thread(target=asyncio.run, args=[call(str(n))]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    asyncio.run(client.close())

    assert sorted(map(str, answers)) == [str([str(n)]) for n in range(4)]


def test_a_call_that_is_cancelled_while_a_thread_begins_it_leaves_no_job(
    server: EmbeddedServer, bystander: Callable[..., Bystander], service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = bystander().queue
    begins, goes_on = threading.Event(), threading.Event()
    begin, handles = Calls.begin, list[Handle]()

    def slow(calls: Calls, *args: Any) -> Handle:
        begins.set()
        assert goes_on.wait(LONG_S)
        handles.append(begin(calls, *args))
        return handles[0]

    monkeypatch.setattr(Calls, "begin", slow)

    async def run() -> None:
        calls = AsyncCalls(Calls(server.url, "ms"))
        starting = asyncio.create_task(calls.start(service, ["a"], CallOptions(), in_thread=True))
        await until(begins.is_set)
        starting.cancel()
        await asyncio.wait({starting})
        goes_on.set()
        await until(lambda: handles)
        with pytest.raises(Cancelled):
            await asyncio.to_thread(handles[0].result, LONG_S)
        await until(lambda: queue.depth() == 0)
        await asyncio.to_thread(calls.calls.close)

    asyncio.run(run())
