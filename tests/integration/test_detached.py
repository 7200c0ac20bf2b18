"""Calls that outlive their caller: asked for by id from any process, run once for one key, kept for a while."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from bystander import Bystander
from support import eventually
from workers import LONG_S, remove, working
from workers import spec as echo_spec

from millstream.broker.config.spec import Runtime
from millstream.broker.contract.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    PartialFailure,
    QueueFull,
    ResultExpired,
    UnknownService,
)
from millstream.broker.contract.job import Json, Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import AsyncClient, Client, acceptance
from millstream.client.detached import Detached

ROWS: list[Json] = [f"row {n}" for n in range(1_000)]

ASK = """
import sys
from millstream.client import Client

with Client(sys.argv[1]) as client:
    print(client.job(sys.argv[2]).result(30))
"""

SUBMIT = """
import sys
from millstream.client import Client

with Client(sys.argv[1]) as client:
    print(client.submit_detached(sys.argv[2], ["a", "b", "c"]).id)
"""


@pytest.fixture(scope="module")
def brief(server: EmbeddedServer) -> Iterator[str]:
    """A service whose results are kept for half a second."""
    name = f"test-brief-{uuid.uuid4().hex[:8]}"
    with working(server.url, echo_spec(name).model_copy(update={"result_ttl": 0.5})):
        yield name
    remove(server.url, name)


def python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=LONG_S, check=True
    )
    return done.stdout.strip()


def test_one_process_submits_and_another_gets_the_result(server: EmbeddedServer, client: Client, echo: str) -> None:
    there = client.submit_detached(echo, ["a", "b", "c"])
    here = client.job(python(SUBMIT, server.url, echo))

    assert python(ASK, server.url, there.id) == "['a', 'b', 'c']"
    assert here.result(LONG_S) == ["a", "b", "c"]


def test_results_can_be_had_again_and_again_and_in_order(client: Client, echo: str) -> None:
    detached = client.submit_detached(echo, ROWS)

    assert detached.result(LONG_S) == ROWS
    assert client.job(detached.id).result(LONG_S) == ROWS
    assert detached.outcomes() == ROWS
    assert detached.done()


def test_threads_may_wait_for_one_detached_call(client: Client, echo: str) -> None:
    detached = client.submit_detached(echo, ROWS)
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(detached.result(LONG_S))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert answers == [ROWS] * 8


def test_a_key_runs_once_however_often_it_is_submitted(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=2)

    def submit(rows: list[Json], tenant: str = "") -> Detached:
        return client.submit_detached(service.name, rows, idempotency_key="order 66", tenant=tenant)

    first, again = submit(["a", "b", "c"]), submit(["a", "b", "c"])
    assert first.id == again.id
    assert service.queue.depth() == 2
    service.answer(*service.claim(2))
    assert again.result(LONG_S) == ["a", "b", "c"]

    assert submit(["a", "b", "c"]).result(LONG_S) == ["a", "b", "c"]
    assert service.queue.depth() == 0
    assert submit(["a", "b", "c"], tenant="other").id != first.id


@pytest.mark.parametrize(
    ("rows", "options"), [(["b"], {}), (["a", "b"], {}), (["a"], {"truncate": "end"}), (["\x00a"], {})]
)
def test_a_key_used_for_another_payload_is_refused(
    client: Client, bystander: Callable[..., Bystander], rows: list[Json], options: dict[str, Json]
) -> None:
    service = bystander(batch_size=8)
    first = client.submit_detached(service.name, ["a"], idempotency_key="k")

    with pytest.raises(InvalidRequest):
        client.submit_detached(service.name, rows, idempotency_key="k", **options)  # type: ignore[arg-type]

    service.answer(*service.claim(1))
    assert first.result(LONG_S) == ["a"]
    with pytest.raises(InvalidRequest):
        client.submit_detached(service.name, rows, idempotency_key="k", **options)  # type: ignore[arg-type]
    assert service.queue.depth() == 0


def test_a_key_names_its_payload_however_the_service_cuts_it_into_jobs_by_now(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=2)
    first = client.submit_detached(service.name, ["a", "b", "c"], idempotency_key="k")
    service.answer(*service.claim(2))
    service.push(runtime=Runtime(batch_size=8))

    with Client(client._calls.connection.url) as later:
        again = later.submit_detached(service.name, ["a", "b", "c"], idempotency_key="k")

        assert again.id == first.id
        assert again.result(LONG_S) == ["a", "b", "c"]
        assert service.queue.depth() == 0
        with pytest.raises(InvalidRequest, match="another payload"):
            later.submit_detached(service.name, ["a", "b", "d"], idempotency_key="k")


def test_several_clients_that_submit_a_key_at_once_make_one_call(
    server: EmbeddedServer, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    rows: list[Json] = [str(row) for row in range(500)]
    ids: list[str] = []

    def submit() -> None:
        with Client(server.url) as client:
            ids.append(client.submit_detached(service.name, rows, idempotency_key="k").id)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)

    assert len(ids) == 4
    assert len(set(ids)) == 1
    assert service.queue.depth() == 500


def test_a_key_runs_again_once_its_results_have_expired(client: Client, brief: str) -> None:
    first = client.submit_detached(brief, ["a"], idempotency_key="k")
    assert first.result(LONG_S) == ["a"]
    eventually(lambda: expired(client, first.id))

    again = client.submit_detached(brief, ["b"], idempotency_key="k")

    assert again.result(LONG_S) == ["b"]


def test_results_of_one_call_expire_together_after_the_last_one(
    client: Client, connection: Connection, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    service.push(result_ttl=1.0)
    detached = client.submit_detached(service.name, ["a", "b", "c"])
    claims = service.claim(3)
    seconds = time.monotonic()

    service.answer(claims[0])
    assert not client.job(detached.id).done()
    eventually(lambda: time.monotonic() - seconds > 2.0)
    service.answer(claims[1])
    eventually(lambda: time.monotonic() - seconds > 3.5)
    service.answer(claims[2])

    assert client.job(detached.id).result(0) == ["a", "b", "c"]
    eventually(lambda: expired(client, detached.id))


def test_a_call_of_thousands_of_jobs_is_done_when_all_are_answered(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1, max_queue_size=5_000)
    rows: list[Json] = [str(row) for row in range(2_500)]
    detached = client.submit_detached(service.name, rows)
    claims = [claim for _ in range(25) for claim in service.claim(100)]
    service.answer_all(claims[:-1])
    assert not client.job(detached.id).done()

    service.answer_all(claims[-1:])

    found = client.job(detached.id)
    assert found.done()
    assert found.result(0) == rows


def expired(client: Client, job_id: str) -> bool:
    try:
        client.job(job_id).done()
    except ResultExpired:
        return True
    return False


def test_a_result_expires(client: Client, brief: str) -> None:
    detached = client.submit_detached(brief, ["a"])
    assert detached.result(LONG_S) == ["a"]

    eventually(lambda: expired(client, detached.id))
    assert detached.result() == ["a"], "who had it keeps it"


def test_an_id_that_was_never_given_out_has_expired(client: Client, echo: str) -> None:
    with pytest.raises(ResultExpired):
        client.job(f"{echo}:4x4:{'0' * 32}").result(LONG_S)


def test_an_id_that_says_another_shape_has_expired(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander(batch_size=2)
    detached = client.submit_detached(service.name, ["a", "b", "c"])

    for shape in ("3x1", "4x2", "30x2"):
        with pytest.raises(ResultExpired):
            client.job(f"{service.name}:{shape}:{detached._call}").done()


@pytest.mark.parametrize(
    "wrong", ["", "9f86d081", "embed:0x8:" + "0" * 32, "embed:8x8:" + "g" * 32, "a b:1x1:" + "0" * 32]
)
def test_what_is_no_id_is_refused(client: Client, wrong: str) -> None:
    with pytest.raises(InvalidRequest):
        client.job(wrong)


def test_an_id_cannot_claim_more_rows_than_a_call_may_have(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        client.job(f"embed:999999999x1:{'0' * 32}")


def test_what_waits_can_be_cancelled_and_its_result_says_so_for_its_lifetime(
    client: Client, connection: Connection, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    detached = client.submit_detached(service.name, ["a", "b"])

    assert client.job(detached.id).cancel()

    assert service.queue.depth() == 0
    with pytest.raises(Cancelled):
        detached.result(LONG_S)
    kept_ms = connection.client.pttl(ServiceKeys(service.name).call(detached._call))
    assert 3_590_000 < kept_ms <= 3_600_000


def test_what_was_taken_or_is_over_is_not_cancelled_without_trace(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(batch_size=1)
    detached = client.submit_detached(service.name, ["a", "b"])
    claims = service.claim(2)

    assert not detached.cancel()
    service.answer(*claims)

    assert detached.result(LONG_S) == ["a", "b"]
    assert not detached.cancel()


def test_a_wait_may_end_before_the_call_does(client: Client, bystander: Callable[..., Bystander]) -> None:
    service = bystander()
    detached = client.submit_detached(service.name, ["a"])

    assert not detached.done()
    with pytest.raises(DeadlineExceeded):
        detached.result(timeout=0.02)


def test_a_detached_call_waits_for_room_as_long_as_it_has_time(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander(max_queue_size=1)
    first = client.submit_detached(service.name, ["first"])

    with pytest.raises(QueueFull):
        client.submit_detached(service.name, ["second"], timeout=0.2)
    service.answer(service.claim_one())

    assert first.result(LONG_S) == ["first"]


def test_rows_that_cannot_travel_are_refused_before_anything_is_sent(
    client: Client, bystander: Callable[..., Bystander]
) -> None:
    service = bystander()

    for rows in ([], ["a", 5], ["\ud800"], ["x" * 600_000]):
        with pytest.raises(InvalidRequest):
            client.submit_detached(service.name, rows)  # type: ignore[arg-type]
    with pytest.raises(UnknownService):
        client.submit_detached(service.name + "x", ["a"])
    assert service.queue.depth() == 0


def test_empty_texts_travel(client: Client, echo: str) -> None:
    assert client.submit_detached(echo, ["", ""]).result(LONG_S) == ["", ""]


def test_a_row_that_fails_fails_alone(client: Client, server: EmbeddedServer, service: str) -> None:
    picky = echo_spec(service)
    picky = picky.model_copy(update={"model": picky.model.model_copy(update={"model_name": "raise:bad"})})
    with working(server.url, picky):
        detached = client.submit_detached(service, ["a", "bad", "c"])
        with pytest.raises(PartialFailure) as caught:
            detached.result(LONG_S)
    remove(server.url, service)

    assert list(caught.value.errors) == [1]
    assert caught.value.results == ["a", None, "c"]


def test_an_async_client_leaves_calls_and_finds_them(server: EmbeddedServer, echo: str) -> None:
    async def run() -> object:
        async with AsyncClient(server.url) as client:
            detached = await client.submit_detached(echo, ["a"])
            return await asyncio.to_thread(client.job(detached.id).result, LONG_S)

    assert asyncio.run(run()) == ["a"]


def test_a_call_of_more_jobs_than_the_queue_holds_enters_as_room_appears(
    server: EmbeddedServer, client: Client
) -> None:
    narrow = echo_spec("test-narrow", batch_size=1, max_queue_size=20)
    rows: list[Json] = [f"{n}" for n in range(110)]
    with working(server.url, narrow):
        assert client.submit_detached("test-narrow", rows).result(LONG_S) == rows
    remove(server.url, "test-narrow")


def test_a_call_enters_a_slow_queue_as_long_as_jobs_of_it_are_accepted(
    server: EmbeddedServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "ROOM_S", 1.0)
    rows: list[Json] = [f"{n}" for n in range(30)]
    with working(server.url, echo_spec("test-slow-queue", forward_s=0.1, batch_size=1, max_queue_size=4)):
        assert client.submit_detached("test-slow-queue", rows).result(LONG_S) == rows
    remove(server.url, "test-slow-queue")


def test_a_call_that_found_no_room_leaves_no_job_behind(
    client: Client, connection: Connection, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(batch_size=1, max_queue_size=200)
    stream = ServiceKeys(service).stream(Priority.BATCH)

    with pytest.raises(QueueFull):
        client.submit_detached(service, [f"{n}" for n in range(300)], timeout=0.5)

    eventually(lambda: connection.client.xlen(stream) == 0)


def test_a_detached_job_says_how_many_tokens_it_has(
    client: Client, connection: Connection, service: str, bystander: Callable[..., Bystander]
) -> None:
    bystander(rate_limit={"tokens": 100})

    with pytest.raises(InvalidRequest, match="rate limit"):
        client.submit_detached(service, ["four words of text " * 100])
    client.submit_detached(service, ["x" * 40])

    ((_, fields),) = cast(
        list[tuple[bytes, dict[bytes, bytes]]], connection.client.xrange(ServiceKeys(service).stream(Priority.BATCH))
    )
    assert fields[b"tokens"] == b"12"


def test_a_call_that_is_forgotten_is_gone_from_the_server(client: Client, echo: str) -> None:
    detached = client.submit_detached(echo, ["a", "b"])
    assert detached.result(LONG_S) == ["a", "b"]
    assert (detached.jobs, detached.fingerprints) == (1, frozenset({"echo:sleep:0.0"}))

    detached.forget()

    eventually(lambda: expired(client, detached.id))
    assert client.submit_detached(echo, ["a", "b"]).result(LONG_S) == ["a", "b"]


def test_each_wait_for_results_uses_the_same_connections(client: Client, connection: Connection, echo: str) -> None:
    def wait_for_one() -> None:
        assert client.submit_detached(echo, ["a"]).result(LONG_S) == ["a"]

    wait_for_one()
    before = connection.client.info("clients")["connected_clients"]
    for _ in range(20):
        wait_for_one()

    assert connection.client.info("clients")["connected_clients"] < before + 10
