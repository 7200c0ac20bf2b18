"""A client's calls, end to end: order, errors by row, time limits, full queues, a server that goes away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bystander import Bystander
from contracts.queue import Queue
from support import eventually
from workers import LONG_S, spec, working

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    NoWorkers,
    PartialFailure,
    QueueFull,
    UnknownService,
)
from millstream.broker.contract.job import Json
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.client.result import Values


def failing(call: Callable[[], object]) -> MillstreamError:
    with pytest.raises(MillstreamError) as caught:
        call()
    return caught.value


# -- rows in, rows out ---------------------------------------------------------------------------------------------


def test_a_list_is_answered_in_its_order(client: Client, echo: str) -> None:
    assert client.submit(echo, ["b", "", "a b c", "水车 🌊"]).result() == ["b", "", "a b c", "水车 🌊"]


def test_a_result_names_the_weights_that_made_it(client: Client, echo: str) -> None:
    result = client.submit(echo, ["a", "b"]).result()

    assert isinstance(result, Values)
    assert result.fingerprint.startswith("echo:")


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b'{"v":1,"shape":[2,3]}\n' + b"\0" * 24,
        b'{"v":1,"shape":[1,2]}\n' + b"\0\0\xc0\x7f" * 2,
        b'{"v":1,"values":[NaN]}\n',
        b'{"v":1,"values":["a","b"]}\n',
        b'{"v":1,"truncated":[99],"errors":{"99":{}}}\n',
        b'{"v":9,"values":["a"]}\n',
    ],
)
def test_a_forged_reply_is_the_failure_of_its_call_and_the_next_one_is_answered(
    client: Client, bystander: Callable[..., Bystander], forged: bytes
) -> None:
    service = bystander()
    handle = client.submit(service.name, ["a"])
    (claim,) = service.claim(1)

    service.queue.settle([claim], forged)

    assert isinstance(failing(lambda: handle.result(LONG_S)), ModelFailed)
    after = client.submit(service.name, ["b"])
    service.answer(*service.claim(1))
    assert after.result(LONG_S) == ["b"]


def test_nothing_is_answered_with_nothing_and_sends_no_job(client: Client, echo: str) -> None:
    assert client.submit(echo, []).result() == []


def test_a_hundred_thousand_rows_come_back_in_order(client: Client, echo: str) -> None:
    rows: list[Json] = [f"row {n} " + "x" * (n % 97) for n in range(100_000)]

    assert client.submit(echo, rows).result(LONG_S) == rows


@pytest.mark.parametrize("wrong", ["text", b"text", 5, None, {"a": 1}])
def test_what_is_no_list_is_refused(client: Client, echo: str, wrong: Sequence[Json]) -> None:
    assert isinstance(failing(lambda: client.submit(echo, wrong)), InvalidRequest)


def test_threads_share_a_client_and_each_gets_its_own_rows(client: Client, echo: str) -> None:
    wrong: list[object] = []
    start = threading.Barrier(32)

    def call(thread: int) -> None:
        start.wait(LONG_S)
        for turn in range(10):
            rows: list[Json] = [f"{thread} {turn} {row}" for row in range(1 + thread % 7)]
            if (answer := client.submit(echo, rows).result(LONG_S)) != rows:
                wrong.append((rows, answer))

    threads = [threading.Thread(target=call, args=[thread]) for thread in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


def test_bad_rows_fail_by_their_index_and_cost_their_neighbours_nothing(client: Client, echo: str) -> None:
    rows: list[Json] = ["a", 5, "b", "\ud800", "x" * 600_000, "c", None]

    error = failing(client.submit(echo, rows).result)

    assert isinstance(error, PartialFailure)
    assert {row: type(each) for row, each in error.errors.items()} == {
        1: InvalidRequest,
        3: InvalidRequest,
        4: InputTooLong,
        6: InvalidRequest,
    }
    assert error.results == ["a", None, "b", None, None, "c", None]


def test_rows_that_all_fail_alike_raise_their_own_error(client: Client, echo: str) -> None:
    assert isinstance(failing(client.submit(echo, [1, 2, 3]).result), InvalidRequest)


def test_answers_are_put_where_their_rows_were_whatever_order_they_come_in(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=2)
    rows: list[Json] = ["word " * (n % 5) + str(n) for n in range(10)]
    handle = client.submit(service.name, rows)
    claims = service.claim(5)

    for claim in reversed(claims):
        service.answer(claim)

    assert handle.result(LONG_S) == rows


def test_an_unknown_service_meets_the_nearest_name(client: Client, echo: str) -> None:
    error = failing(lambda: client.submit(echo + "x", ["a"]))

    assert isinstance(error, UnknownService)
    assert error.did_you_mean == echo


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon"])
def test_a_timeout_is_a_number_above_zero(client: Client, echo: str, timeout: float) -> None:
    assert isinstance(failing(lambda: client.submit(echo, ["a"], timeout=timeout)), InvalidRequest)


def test_an_endless_timeout_is_none(client: Client, echo: str) -> None:
    assert client.submit(echo, ["a"], timeout=float("inf")).result(LONG_S) == ["a"]


# -- full queues ---------------------------------------------------------------------------------------------------


def test_without_patience_a_full_queue_refuses_at_once_and_accepts_nothing(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(max_queue_size=4, batch_size=1)
    for n in range(4):
        client.submit(service.name, [str(n)])
    eventually(lambda: service.queue.depth() == 4)

    error = failing(client.submit(service.name, ["one too many"], wait=False).result)

    assert isinstance(error, QueueFull)
    assert error.retry_after
    assert service.queue.depth() == 4


def test_a_patient_call_waits_for_room(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(max_queue_size=1)
    first = client.submit(service.name, ["first"])
    claims = service.claim(1)
    second = client.submit(service.name, ["second"])
    assert not second.done()

    service.answer(*claims)
    service.answer(*service.claim(1))

    assert (first.result(LONG_S), second.result(LONG_S)) == (["first"], ["second"])


def test_a_call_larger_than_the_queue_is_sent_piece_by_piece(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(max_queue_size=8, batch_size=1)
    rows: list[Json] = [str(n) for n in range(20)]
    handle = client.submit(service.name, rows)
    most = 0

    while not handle.done():
        claims = service.queue.claim("bystander").claims
        most = max(most, service.queue.depth())
        service.answer(*claims)

    assert handle.result() == rows
    assert 0 < most <= 2


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_call_whose_time_is_over_without_a_live_worker_says_so(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    handle = client.submit(bystander(total_timeout=0.1).name, ["a"])

    assert isinstance(failing(lambda: handle.result(LONG_S)), NoWorkers)


def test_a_call_whose_time_is_over_with_a_busy_worker_exceeds_its_deadline(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()
    service.live()
    handle = client.submit(service.name, ["a"], timeout=0.1)

    error = failing(lambda: handle.result(LONG_S))

    assert isinstance(error, DeadlineExceeded)
    assert error.phase == "total"


def test_a_wait_may_end_before_the_call_does(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    handle = client.submit(service.name, ["a"])

    assert isinstance(failing(lambda: handle.result(timeout=0.05)), DeadlineExceeded)
    service.answer(*service.claim(1))

    assert handle.result(LONG_S) == ["a"]
    assert handle.result() == ["a"]


def test_every_thread_that_waits_for_a_call_hears_of_its_end(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    handle = client.submit(bystander().name, ["a"], timeout=0.2)
    errors: list[MillstreamError] = []
    threads = [threading.Thread(target=lambda: errors.append(failing(handle.result)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)

    assert [type(error) for error in errors] == [NoWorkers] * 4


def test_an_answer_that_comes_too_late_is_dropped(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    handle = client.submit(service.name, ["a"], timeout=0.1)
    claims = service.claim(1)
    assert isinstance(failing(handle.result), NoWorkers)

    service.answer(*claims)
    after = client.submit(service.name, ["b"])
    service.answer(*service.claim(1))

    assert after.result(LONG_S) == ["b"]
    assert isinstance(failing(handle.result), NoWorkers)


def test_a_job_that_waited_too_long_for_a_worker_ends_in_its_queue_time(
    client: Client, server: EmbeddedServer, service: str, connection: Connection
) -> None:
    hasty = spec(service, queue_timeout=0.1)
    with working(server.url, hasty) as supervisor:
        assert client.submit(service, ["warm"], priority="batch").result(LONG_S) == ["warm"]
        (pid,) = supervisor.pids
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        handle = client.submit(service, ["late"])
        eventually(lambda: time.monotonic() > began + 0.2)
        os.kill(pid, signal.SIGCONT)

        error = failing(lambda: handle.result(LONG_S))

    connection.client.srem("ms:services", service)
    assert isinstance(error, DeadlineExceeded)
    assert error.phase == "queue"


# -- ends ----------------------------------------------------------------------------------------------------------


def test_closing_a_client_ends_its_calls_at_once(server: EmbeddedServer, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    client = Client(server.url)
    handle = client.submit(service.name, ["a"])
    service.claim(1)
    errors: list[MillstreamError] = []
    waiter = threading.Thread(target=lambda: errors.append(failing(handle.result)), daemon=True)
    waiter.start()

    client.close()
    waiter.join(10.0)

    assert isinstance(errors[0], BrokerUnavailable)
    assert isinstance(failing(lambda: client.submit(service.name, ["b"]).result(LONG_S)), BrokerUnavailable)


def test_a_call_outlives_its_server(tmp_path: Path, server_binary: Path) -> None:
    rows: list[Json] = [f"row {n}" for n in range(400)]
    with (
        EmbeddedServer.start(tmp_path / "data", binary=server_binary, appendfsync="always") as server,
        working(server.url, spec("echo", forward_s=0.02, batch_size=4)) as supervisor,
        Client(server.url) as client,
    ):
        handle = client.submit("echo", rows)
        eventually(lambda: handle.rows_done > 20, within_s=LONG_S)
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: not server.alive())
        assert not handle.done()
        server.restart()

        assert handle.result(LONG_S) == rows
        connection = Connection(server.url, name="tests")
        queue = Queue(connection.client, ServiceKeys("echo"))
        eventually(lambda: queue.depth() == 0)
        assert queue.dead_letters() == []
        assert supervisor.restarts == 0
        connection.close()
