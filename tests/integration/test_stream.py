"""A stream gives a text in order, nothing twice and nothing missing, and ends with a reason or a typed error."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support import eventually
from workers import LONG_S
from writer import Writer, register

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    ResultExpired,
    StreamDiverged,
    WorkerLost,
)
from millstream.broker.contract.job import Json, Reply
from millstream.broker.queue import streams
from millstream.broker.queue.replies import Answer, Replies
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, TextStream

STEP_S = 0.15
"""Between two pieces of a worker that takes its time."""

Open = Callable[..., Writer]


@pytest.fixture
def writer(connection: Connection, service: str) -> Iterator[Open]:
    """Registers the test's service, with the limits it is given; its only worker is the test."""

    def open_writer(**runtime: object) -> Writer:
        register(connection, service, **runtime)
        opened = Writer(connection, service)
        opened.live()
        return opened

    yield open_writer
    connection.client.srem("ms:services", service)


@contextmanager
def at_once(act: Callable[[], object]) -> Iterator[None]:
    """`act` runs in a thread beside the block; fails the test if it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(LONG_S)
    assert not errors


def cancelled(writer: Writer) -> bool:
    return writer.claim.address.name in writer.live()


# -- what comes ----------------------------------------------------------------------------------------------------


def test_pieces_come_as_they_are_written_and_the_end_has_its_reason(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, {"prompt": "a mill"}, temperature=0.5)
    rows, options = worker.take()

    worker.write("the ", "mïll ")
    first = next(stream)
    worker.write("🌊")
    second = next(stream)
    before_the_end = stream.finish_reason
    worker.settle(reason="length")

    assert (rows, options) == ([{"prompt": "a mill"}], {"temperature": 0.5})
    assert (first, second, list(stream)) == ("the mïll ", "🌊", [])
    assert (stream.text, before_the_end, stream.finish_reason) == ("the mïll 🌊", None, "length")
    assert stream.usage == {"tokens": 7}
    assert stream.timings["total"] > 0
    assert list(stream) == []


def test_a_waiting_thread_gets_each_piece_at_once(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    written: list[float] = []

    def write() -> None:
        worker.take()
        for n in range(10):
            time.sleep(STEP_S)
            written.append(time.monotonic())
            worker.write(str(n))
        worker.settle()

    with at_once(write):
        came = [(piece, time.monotonic()) for piece in client.stream(service, "a")]

    assert [piece for piece, _ in came] == list("0123456789")
    delays = sorted(at - begun for (_, at), begun in zip(came, written, strict=True))
    # The median: a stall of the machine does not decide. A thread that nobody wakes looks after 2 s.
    assert delays[5] < 0.5


def test_a_call_that_does_not_iterate_until_the_end_gets_all_of_it(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    for n in range(300):
        worker.write(f"{n} ")
    worker.settle()

    assert "".join(stream) == "".join(f"{n} " for n in range(300))


def test_an_empty_text_has_no_pieces(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.settle("")

    assert list(stream) == []
    assert stream.finish_reason == "stop"


def test_text_that_is_delivered_again_is_cut(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    worker.show(0, "ab")
    worker.show(1, "b")
    worker.write("cd")
    worker.show(3, "de")
    got = [next(stream), next(stream), next(stream)]
    worker.settle("abcde")

    assert [*got, *stream] == ["ab", "cd", "e"]


def test_a_gap_is_filled_from_the_text_so_far(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    worker.write("cd", shown=False)
    worker.write("ef")

    got = [next(stream), next(stream)]
    worker.write("gh")
    got.append(next(stream))
    worker.settle()

    assert [*got, *stream] == ["ab", "cdef", "gh"]


def test_gaps_of_one_text_are_filled_one_by_one(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    got = []
    for number in range(3):
        worker.write(f"mïll{number} ")
        got.append(next(stream))
        worker.write(f"🌊{number} ", shown=False)
        worker.write("ef ")
        got.append(next(stream))
    worker.settle()

    assert [*got, *stream] == ["mïll0 ", "🌊0 ef ", "mïll1 ", "🌊1 ef ", "mïll2 ", "🌊2 ef "]


def test_a_gap_that_the_server_cannot_fill_is_filled_by_the_reply(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    first = next(stream)
    worker.show(4, "ef")
    worker.show(6, "gh")

    with at_once(lambda: worker.settle("abcdefgh")):
        assert (first, list(stream)) == ("ab", ["cdefgh"])


def test_a_client_that_read_slowly_catches_up_and_goes_on(
    client: Client, service: str, writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of unread entries: enough for a few reads, and quickly written.
    most = 600
    reads, read = threading.Event(), Replies.read

    def slowly(replies: Replies, wait_s: float) -> list[Answer]:
        reads.wait(LONG_S)
        return read(replies, wait_s)

    monkeypatch.setattr(Replies, "read", slowly)
    monkeypatch.setattr(streams, "MOST_UNREAD_DELTAS", most)
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    for _ in range(most + 50):
        worker.write("x")
    reads.set()
    while len(stream.text) < most:
        next(stream)
    eventually(lambda: worker.queue.client.xlen(worker.queue.keys.reply(worker.claim.address.client)) < most)
    worker.write("yz")

    assert (stream.text, next(stream)) == ("x" * most, "x" * 50 + "yz")
    worker.settle()
    assert list(stream) == []


def test_a_worker_that_takes_over_in_the_middle_goes_on_with_the_text(
    client: Client, connection: Connection, service: str, writer: Open
) -> None:
    worker, other = writer(), Writer(connection, service, "w2")
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    first = next(stream)
    worker.lose()
    other.take()
    other.write("cd")
    second = next(stream)
    other.settle()

    assert (first, second, list(stream), stream.text) == ("ab", "cd", [], "abcd")


def test_connections_that_are_cut_in_the_middle_lose_nothing(
    client: Client, connection: Connection, service: str, writer: Open
) -> None:
    worker = writer()
    text = "".join(f"{n} " for n in range(60))

    def write() -> None:
        worker.take()
        for n in range(60):
            worker.write(f"{n} ")
            if n % 10 == 5:
                connection.client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.005)
        worker.settle()

    with at_once(write):
        assert "".join(client.stream(service, "a")) == text


# -- how it ends ---------------------------------------------------------------------------------------------------


def test_a_reply_that_does_not_continue_the_text_is_an_error_and_no_splice(
    client: Client, service: str, writer: Open
) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    first = next(stream)
    worker.settle("axyz")

    for _ in range(2):
        with pytest.raises(StreamDiverged):
            next(stream)
    assert (first, stream.text, stream.finish_reason) == ("ab", "ab", None)


def test_a_text_so_far_that_does_not_continue_the_text_cancels_the_job(
    client: Client, service: str, writer: Open
) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.show(0, "zz")
    first = next(stream)
    worker.write("abc", shown=False)
    worker.write("de")

    for _ in range(2):
        with pytest.raises(StreamDiverged):
            next(stream)
    assert first == "zz"
    eventually(lambda: cancelled(worker))


@pytest.mark.parametrize("value", [None, "text", {"text": "ab"}, {"text": 1, "finish_reason": "stop"}])
def test_a_reply_of_another_shape_is_the_models_failure(
    client: Client, service: str, writer: Open, value: Json
) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.answer(Reply(values=[value]))

    with pytest.raises(ModelFailed):
        next(stream)


def test_the_jobs_error_comes_after_the_pieces_before_it(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    worker.fail(WorkerLost("died three times"))

    assert next(stream) == "ab"
    with pytest.raises(WorkerLost):
        next(stream)


def test_closing_cancels_the_job(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    first = next(stream)

    stream.close()

    eventually(lambda: cancelled(worker))
    with pytest.raises(Cancelled):
        next(stream)
    assert (first, stream.text) == ("ab", "ab")


def test_leaving_the_block_cancels_a_job_that_waits(client: Client, service: str, writer: Open) -> None:
    worker = writer()

    with client.stream(service, "a"):
        eventually(lambda: worker.queue.depth() == 1)

    eventually(lambda: worker.queue.depth() == 0)


def test_leaving_the_block_after_the_end_changes_nothing(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    with client.stream(service, "a") as stream:
        worker.take()
        worker.write("ab")
        worker.settle()
        got = list(stream)

    assert (got, stream.finish_reason, worker.live()) == (["ab"], "stop", [])


def test_closing_from_another_thread_wakes_the_one_that_waits(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()

    def close() -> None:
        time.sleep(STEP_S)
        stream.close()

    with at_once(close), pytest.raises(Cancelled):
        next(stream)


def test_an_interrupt_of_the_waiting_thread_cancels_the_job(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    main = threading.main_thread().ident
    assert main

    def interrupt() -> None:
        time.sleep(STEP_S)
        signal.pthread_kill(main, signal.SIGINT)

    with at_once(interrupt), pytest.raises(KeyboardInterrupt):
        next(stream)

    eventually(lambda: cancelled(worker))


def test_without_any_text_the_call_ends_at_the_services_total_timeout(
    client: Client, service: str, writer: Open
) -> None:
    worker = writer(total_timeout=0.5)
    began = time.monotonic()
    stream = client.stream(service, "a")
    worker.take()

    with pytest.raises(DeadlineExceeded):
        next(stream)

    assert 0.4 < time.monotonic() - began < LONG_S
    eventually(lambda: cancelled(worker))


def test_pieces_keep_a_call_alive_beyond_the_services_total_timeout(client: Client, service: str, writer: Open) -> None:
    worker = writer(total_timeout=10 * STEP_S)

    def write() -> None:
        worker.take()
        assert worker.claim.job
        assert worker.claim.job.deadline == 0
        for n in range(15):
            time.sleep(STEP_S)
            worker.live()
            worker.write(f"{n} ")
        worker.settle()

    began = time.monotonic()
    with at_once(write):
        text = "".join(client.stream(service, "a"))

    assert text == "".join(f"{n} " for n in range(15))
    assert time.monotonic() - began > 14 * STEP_S


def test_with_a_timeout_the_call_ends_then_whatever_comes(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a", timeout=12 * STEP_S)
    over = threading.Event()

    def write() -> None:
        worker.take()
        while not over.wait(STEP_S / 2):
            worker.write("x")

    with at_once(write):
        try:
            with pytest.raises(DeadlineExceeded):
                "".join(stream)
        finally:
            over.set()
    assert set(stream.text) == {"x"}
    eventually(lambda: cancelled(worker))


def test_a_job_whose_text_has_begun_is_never_sent_again(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    stream = client.stream(service, "a")
    worker.take()
    worker.write("ab")
    first = next(stream)
    worker.fail(DeadlineExceeded("late"))

    with pytest.raises(DeadlineExceeded):
        next(stream)
    assert (first, worker.queue.depth()) == ("ab", 0)


def test_a_service_that_does_not_stream_gets_no_job(client: Client, echo: str, connection: Connection) -> None:
    with pytest.raises(InvalidRequest, match="does not stream"):
        client.stream(echo, "a")


def test_a_payload_that_is_not_json_is_an_invalid_request(client: Client, service: str, writer: Open) -> None:
    worker = writer()

    with pytest.raises(InvalidRequest):
        next(client.stream(service, object()))
    assert worker.queue.depth() == 0


def test_closing_the_client_ends_the_stream(server: EmbeddedServer, service: str, writer: Open) -> None:
    worker = writer()
    with Client(server.url) as client:
        stream = client.stream(service, "a")
        worker.take()

    with pytest.raises(BrokerUnavailable):
        next(stream)


# -- other calls of the same service -------------------------------------------------------------------------------


def test_call_and_submit_wait_for_the_whole_result(client: Client, service: str, writer: Open) -> None:
    worker = writer(batch_size=8)
    handle = client.submit(service, ["a", ["b"]])
    for _ in range(2):
        (row,), _ = worker.take()
        worker.write(f"text of {row}")
        worker.settle()

    assert handle.result(LONG_S) == [
        {"text": "text of a", "finish_reason": "stop"},
        {"text": "text of ['b']", "finish_reason": "stop"},
    ]


def test_a_detached_call_of_one_row_has_a_text_so_far(client: Client, service: str, writer: Open) -> None:
    worker = writer()
    job = client.submit_detached(service, ["a"])
    empty = job.partial()
    worker.take()
    worker.write("ab")
    begun = client.job(job.id).partial()
    worker.write("cd")
    worker.settle()

    assert (empty, begun, job.partial()) == ("", "ab", "abcd")
    assert job.result(LONG_S) == [{"text": "abcd", "finish_reason": "stop"}]


def test_a_text_so_far_of_several_rows_or_of_an_unknown_call_is_an_error(
    client: Client, service: str, writer: Open
) -> None:
    writer()
    several = client.submit_detached(service, ["a", "b"])
    gone = client.job(f"{service}:1x1:{'0' * 32}")

    with pytest.raises(InvalidRequest, match="one row"):
        several.partial()
    with pytest.raises(ResultExpired):
        gone.partial()


# -- asyncio -------------------------------------------------------------------------------------------------------


def test_tasks_iterate_at_the_same_time_and_each_gets_its_own_text(
    server: EmbeddedServer, connection: Connection, service: str, writer: Open
) -> None:
    writer()
    workers = [Writer(connection, service, f"w{n}") for n in range(3)]

    async def read(client: AsyncClient, name: str) -> tuple[str, str | None]:
        stream = client.stream(service, name)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == stream.text
        return stream.text, stream.finish_reason

    async def run() -> list[tuple[str, str | None]]:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(*[read(client, name) for name in "abc"])

    def write(worker: Writer) -> None:
        (name,), _ = worker.take()
        for n in range(20):
            worker.write(f"{name}{n} ")
        worker.settle()

    with at_once(lambda: write(workers[0])), at_once(lambda: write(workers[1])), at_once(lambda: write(workers[2])):
        texts = asyncio.run(run())

    assert texts == [("".join(f"{name}{n} " for n in range(20)), "stop") for name in "abc"]


def test_a_task_gets_a_gap_filled_and_a_text_that_diverges_is_its_error(
    server: EmbeddedServer, service: str, writer: Open
) -> None:
    worker = writer()

    async def run() -> list[str]:
        got: list[str] = []
        async with AsyncClient(server.url) as client, client.stream(service, "a") as stream:
            await asyncio.to_thread(worker.take)
            await asyncio.to_thread(worker.write, "ab")
            got.append(await anext(stream))
            await asyncio.to_thread(worker.write, "cd", shown=False)
            await asyncio.to_thread(worker.write, "ef")
            got.append(await anext(stream))
            await asyncio.to_thread(worker.settle, "other")
            with pytest.raises(StreamDiverged):
                await anext(stream)
        return got

    assert asyncio.run(run()) == ["ab", "cdef"]


def test_a_cancelled_task_and_a_left_block_cancel_their_jobs(
    server: EmbeddedServer, connection: Connection, service: str, writer: Open
) -> None:
    worker, other = writer(), Writer(connection, service, "w2")

    async def read(client: AsyncClient) -> None:
        async for _ in client.stream(service, "a"):
            pass

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            task = asyncio.create_task(read(client))
            await asyncio.to_thread(worker.take)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with client.stream(service, "b"):
                await asyncio.to_thread(other.take)
            await asyncio.to_thread(eventually, lambda: cancelled(worker))
            await asyncio.to_thread(eventually, lambda: cancelled(other))

    asyncio.run(run())


def test_a_task_that_waits_ends_at_the_time_limit(server: EmbeddedServer, service: str, writer: Open) -> None:
    worker = writer(total_timeout=10 * STEP_S)

    async def run() -> str:
        async with AsyncClient(server.url) as client:
            stream = client.stream(service, "a")
            await stream.__aenter__()
            await asyncio.to_thread(worker.take)
            await asyncio.to_thread(worker.write, "ab")
            with pytest.raises(DeadlineExceeded):
                async for _ in stream:
                    pass
            return stream.text

    assert asyncio.run(run()) == "ab"


def test_an_async_stream_of_a_service_that_does_not_stream_is_an_error_at_its_first_step(
    server: EmbeddedServer, echo: str
) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(InvalidRequest):
                await anext(client.stream(echo, "a"))
            closed = client.stream(echo, "a")
            await closed.close()
            with pytest.raises(Cancelled):
                await anext(closed)

    asyncio.run(run())


def test_the_module_has_it_too(monkeypatch: pytest.MonkeyPatch, client: Client, service: str, writer: Open) -> None:
    from millstream import client as module

    monkeypatch.setattr(module, "default", lambda: client)
    worker = writer()
    stream = module.stream(service, "a", priority="realtime")
    worker.take()
    worker.settle("text")

    assert isinstance(stream, TextStream)
    assert list(stream) == ["text"]
    assert stream.id == worker.claim.address.job_id
