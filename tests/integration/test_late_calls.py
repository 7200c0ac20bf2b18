"""A call ends in its time, whatever the server does, and goes on as long as it is answered."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from bystander import Bystander
from integration.faults import frozen
from redis import Redis
from support import eventually
from workers import LONG_S, remove, spec, working

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError, NoWorkers
from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client

pytestmark = pytest.mark.early

SLACK_S = 0.5
"""Seconds after its timeout within which a call must end."""


@pytest.fixture
def own_server(tmp_path: Path, server_binary: Path) -> Iterator[EmbeddedServer]:
    """A server that this test may harm, with a service nobody serves."""
    with EmbeddedServer.start(tmp_path, binary=server_binary) as server:
        connection = Connection(server.url)
        Registry(connection).push([spec("s")])
        connection.close()
        yield server


def ended(call: Callable[[], object]) -> tuple[float, Exception | None]:
    """How long a call took, seconds, and its error."""
    began = time.monotonic()
    try:
        call()
    except MillstreamError as error:
        return time.monotonic() - began, error
    return time.monotonic() - began, None


def test_while_the_server_is_frozen_a_blocking_call_ends_in_its_time(own_server: EmbeddedServer) -> None:
    with Client(own_server.url) as client:
        ended(lambda: client.submit("s", ["a"], timeout=0.01).result())
        ends: list[tuple[float, Exception | None]] = []

        def call() -> None:
            ends.append(ended(lambda: client.submit("s", ["a"], timeout=1.0).result()))

        threads = [threading.Thread(target=call) for _ in range(50)]
        with frozen(own_server.pid):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LONG_S)

        assert len(ends) == 50
        assert max(seconds for seconds, _ in ends) < 1.0 + SLACK_S
        assert {type(error) for _, error in ends} == {BrokerUnavailable}
        with pytest.raises(NoWorkers):
            client.submit("s", ["a"], timeout=0.2).result()


def test_a_client_that_never_heard_of_the_service_ends_in_its_time_too(own_server: EmbeddedServer) -> None:
    with Client(own_server.url) as client, frozen(own_server.pid):
        seconds, error = ended(lambda: client.submit("s", ["a"], timeout=0.5))
        unnamed, no_service = ended(lambda: client.embed(["a"], timeout=0.5))

    assert max(seconds, unnamed) < 0.5 + SLACK_S
    assert isinstance(error, BrokerUnavailable)
    assert isinstance(no_service, BrokerUnavailable)


def test_while_the_server_is_frozen_async_calls_end_in_their_time_and_leave_asyncios_threads_alone(
    own_server: EmbeddedServer,
) -> None:
    async def late(client: AsyncClient, after: float) -> tuple[float, Exception | None]:
        await asyncio.sleep(after)
        began = time.monotonic()
        try:
            await (await client.submit("s", ["a"], timeout=1.0))
        except MillstreamError as error:
            return time.monotonic() - began, error
        return time.monotonic() - began, None

    async def others(seconds: list[float]) -> None:
        while True:
            began = time.monotonic()
            await asyncio.to_thread(lambda: None)
            seconds.append(time.monotonic() - began)
            await asyncio.sleep(0.02)

    async def run() -> tuple[list[tuple[float, Exception | None]], list[float]]:
        waits: list[float] = []
        async with AsyncClient(own_server.url) as client:
            await late(client, 0.0)
            with frozen(own_server.pid):
                beside = asyncio.create_task(others(waits))
                ends = await asyncio.gather(*(late(client, n * 0.01) for n in range(200)))
                beside.cancel()
        return ends, waits

    ends, waits = asyncio.run(run())

    assert max(seconds for seconds, _ in ends) < 1.0 + SLACK_S
    assert {type(error) for _, error in ends} == {BrokerUnavailable}
    assert max(waits) < SLACK_S


def test_while_the_server_is_frozen_detached_calls_end_in_their_time(own_server: EmbeddedServer) -> None:
    async def submit(client: AsyncClient) -> float:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await client.submit_detached("s", ["a"], timeout=1.0)
        return time.monotonic() - began

    async def run() -> list[float]:
        async with AsyncClient(own_server.url) as client:
            await client.submit_detached("s", ["a"])
            with frozen(own_server.pid):
                return await asyncio.gather(*(submit(client) for _ in range(100)))

    assert max(asyncio.run(run())) < 1.0 + SLACK_S
    with Client(own_server.url) as client:
        job = client.submit_detached("s", ["a"])
        with frozen(own_server.pid):
            seconds, error = ended(lambda: job.result(1.0))
    assert seconds < 1.0 + SLACK_S
    assert error is not None


def test_a_process_ends_though_the_server_it_called_is_frozen(own_server: EmbeddedServer) -> None:
    code = f"""
import sys, time
from millstream.client import Client
client = Client({own_server.url!r})
print("ready", flush=True)
sys.stdin.readline()
try:
    client.submit("s", ["a"], timeout=0.2).result()
except Exception:
    print(time.time(), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    with frozen(own_server.pid):
        said, _ = process.communicate("go\n", timeout=LONG_S)
        took = time.time() - float(said)

    # It waits for the server for a second at most; on a busy machine Python's own end takes another one.
    assert took < 3.0


def test_a_client_that_is_closed_ends_a_detached_submission(
    client: Client, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(batch_size=1, max_queue_size=1)
    errors: list[Exception] = []

    def submit() -> None:
        try:
            client.submit_detached(service, ["a", "b"])
        except MillstreamError as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    eventually(lambda: client._calls.channel._sender and client._calls.channel._sender._submitter.next_at)
    client.close()
    thread.join(LONG_S)

    assert isinstance(errors[0], BrokerUnavailable)


def test_what_the_caller_changes_while_an_async_call_waits_for_the_server_does_not_travel(
    own_server: EmbeddedServer,
) -> None:
    async def run() -> list[int]:
        async with AsyncClient(own_server.url) as client:
            rows = ["a", "b", "c"]
            task = asyncio.create_task(client.submit("s", rows))
            await asyncio.sleep(0)
            rows[:] = ["z"]
            handle = await task
            return [len(handle._handle._rows)]

    assert asyncio.run(run()) == [3]


@pytest.fixture(scope="module")
def slow(server: EmbeddedServer) -> Iterator[str]:
    """A service whose forwards take a third of the time that a job has."""
    limits = {"batch_size": 2, "max_batch_tokens": 10_000, "total_timeout": 1.5}
    priorities = {"batch": {"total_timeout": 1.5}}
    with working(server.url, spec("test-slow", forward_s=0.5, priorities=priorities, **limits)):
        yield "test-slow"
    remove(server.url, "test-slow")


def test_a_list_and_a_map_of_slow_forwards_complete_however_long_they_take(client: Client, slow: str) -> None:
    rows = [f"{n}" for n in range(24)]

    listed = client.submit(slow, rows).result(LONG_S)
    mapped = list(client.map(slow, rows, window=24))

    assert listed == mapped == rows


def test_a_slow_call_whose_worker_is_frozen_ends_with_an_error(server: EmbeddedServer) -> None:
    limits = spec("test-frozen", forward_s=0.2, batch_size=2, total_timeout=1.5)
    with working(server.url, limits) as supervisor, Client(server.url) as client:
        handle = client.submit("test-frozen", [f"{n}" for n in range(100)])
        eventually(lambda: handle.rows_done)
        with frozen(*supervisor.pids):
            seconds, error = ended(lambda: handle.result(LONG_S))

    remove(server.url, "test-frozen")
    assert seconds < 10.0
    assert error is not None


def test_a_list_cleared_after_submitting_is_answered_as_it_was_and_harms_no_other_call(
    client: Client, echo: str
) -> None:
    rows = [f"row {n}" for n in range(6_000)]
    kept = list(rows)

    handle = client.submit(echo, rows)
    rows.clear()

    assert client.submit(echo, ["other"]).result(LONG_S) == ["other"]
    assert handle.result(LONG_S) == kept


def test_a_rate_of_calls_admits_calls_and_not_the_later_jobs_of_refused_ones(
    client: Client, connection: Connection, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(batch_size=1, rate_limit={"requests": 0.5, "burst": 1})
    keys = ServiceKeys(service)
    handles = [client.submit(service, [f"{n}" for n in range(10)]) for _ in range(16)]

    # All are sent or wait: one was admitted, and one more at most by the time since.
    channel = client._calls.channel
    eventually(lambda: all(channel.refusal_of(handle.id) for handle in handles[4:]))
    accepted = connection.client.xlen(keys.stream(Priority.NORMAL))
    for handle in handles:
        handle.cancel_soon()

    # The window of the call that was admitted, and of one more that the time since may have let in.
    assert 1 <= accepted <= 16


def test_two_thousand_that_wait_for_room_ask_the_server_a_few_times_a_second(
    client: Client, connection: Connection, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(rate_limit={"requests": 10})
    keys, redis = ServiceKeys(service), connection.client
    stream = keys.stream(Priority.NORMAL)
    handles = [client.submit(service, ["x" * 2_000]) for _ in range(2_000)]
    eventually(lambda: redis.xlen(stream) >= 12)
    admitted, before, began = redis.xlen(stream), _scripts(redis), time.monotonic()

    eventually(lambda: redis.xlen(stream) >= admitted + 20, within_s=30.0)
    calls, received = (after - then for after, then in zip(_scripts(redis), before, strict=True))
    seconds = time.monotonic() - began
    entries = cast(list[tuple[bytes, dict[bytes, bytes]]], redis.xrange(stream))
    first = [fields[b"id"].decode() for _, fields in entries]
    for handle in handles:
        handle.cancel_soon()

    assert calls / seconds < 100
    assert received / seconds < 500_000, "bytes"
    assert first == [handle.id for handle in handles[: len(first)]], "first come, first served"


def _scripts(redis: Redis) -> tuple[int, int]:
    """Script calls so far, and bytes received."""
    return redis.info("commandstats")["cmdstat_evalsha"]["calls"], redis.info("stats")["total_net_input_bytes"]


CALLS = """
import signal, sys
from millstream.client import Client

# A shell's background processes ignore it, and what they start does too.
signal.signal(signal.SIGINT, signal.default_int_handler)

with Client(sys.argv[1]) as client:
    texts = [f"text {n}" for n in range(2_000)]
    if sys.argv[3] == "embed":
        client.embed(texts, service=sys.argv[2])
    else:
        list(client.map(sys.argv[2], texts))
"""


@pytest.mark.parametrize("kind", ["embed", "map"])
def test_ctrl_c_in_a_call_leaves_no_job_of_it_behind(
    server: EmbeddedServer, connection: Connection, service: str, bystander: Callable[..., Bystander], kind: str
) -> None:
    bystander()
    streams = ServiceKeys(service).streams()
    caller = subprocess.Popen([sys.executable, "-c", CALLS, server.url, service, kind], stderr=subprocess.PIPE)
    eventually(lambda: sum(connection.client.xlen(stream) for stream in streams) >= 8, within_s=LONG_S)

    caller.send_signal(signal.SIGINT)
    try:
        _, said = caller.communicate(timeout=LONG_S)
    finally:
        caller.kill()

    assert b"KeyboardInterrupt" in said
    assert [connection.client.xlen(stream) for stream in streams] == [0, 0, 0]
