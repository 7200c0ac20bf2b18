"""The FastAPI example does what its page says: vectors, statuses, and jobs that end with the requests they are for."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi_service as example
import httpx
import numpy as np
import pytest
from contracts.queue import Queue
from support import eventually

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    ConfigError,
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    NoWorkers,
    PartialFailure,
    QueueFull,
    RateLimited,
    UnknownService,
    WorkerLost,
)
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Embeddings
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

LONG_S = 60.0
SECRET = "redis://queue-host:6379"


@pytest.fixture
def registry(server: EmbeddedServer, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Services that no other test has, where the example looks for its own."""
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    monkeypatch.setenv("MILLSTREAM_REDIS_URL", server.url)
    monkeypatch.setenv("MILLSTREAM_REDIS__KEY_PREFIX", prefix)
    yield Registry(connection, prefix)
    connection.client.unlink(f"{prefix}:none", *connection.client.scan_iter(f"{prefix}:*", count=1000))


@pytest.fixture
def queue(registry: Registry, connection: Connection) -> Queue:
    """The example's service, with room for one job and nobody to run it."""
    registry.push([spec("none", max_queue_size=1)])
    return Queue(connection.client, registry.keys(example.SERVICE))


def spec(model_name: str, **runtime: object) -> ServiceSpec:
    return ServiceSpec(
        name=example.SERVICE,
        model=ModelSpec(type="embedding", model_name=model_name, device="cpu"),
        model_ref="m",
        runtime=Runtime.model_validate(runtime),
    )


@asynccontextmanager
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    """Calls the running example in this process."""
    transport = httpx.ASGITransport(example.app)
    async with example.lifespan(example.app), httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        yield client


def ask(*texts: str) -> httpx.Response:
    async def post() -> httpx.Response:
        async with browser() as client:
            return await client.post("/embed", json={"texts": texts})

    return asyncio.run(post())


class Failing:
    """A client whose every call fails."""

    def __init__(self, error: MillstreamError) -> None:
        self._error = error

    async def embed(self, texts: list[str], **options: object) -> Embeddings:
        raise self._error


@pytest.fixture
def failing(queue: Queue) -> Iterator[type[Failing]]:
    yield Failing
    example.app.dependency_overrides.clear()


# -- answers -------------------------------------------------------------------------------------------------------


def test_texts_become_the_model_s_vectors_and_a_bad_one_is_named(
    registry: Registry, server: EmbeddedServer, tiny_model: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["the stream", "turns the mill"]
    registered = spec(str(tiny_model))
    registry.push([registered])
    supervisor = Supervisor(server.url, registry.keys("").prefix, [Plan(registered, 1)])
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        eventually(lambda: supervisor.ready == 1, within_s=LONG_S)

        answer, refused = ask(*texts), ask("short", "mill " * 100, "short")
    finally:
        supervisor.stop()
        thread.join(LONG_S)

    assert answer.status_code == 200
    expected = SentenceTransformer(str(tiny_model), device="cpu").encode(texts)
    np.testing.assert_allclose(answer.json()["vectors"], expected, atol=1e-5)
    assert answer.json()["tokens"] > len(texts)
    assert refused.status_code == 422
    ((row, error),) = refused.json()["errors"].items()
    assert (refused.json()["code"], row, error["code"]) == ("partial_failure", "1", "input_too_long")


def test_a_request_without_texts_is_unprocessable(queue: Queue) -> None:
    assert ask().status_code == 422


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull(SECRET, retry_after=2.1), 429, "3"),
        (RateLimited(SECRET, retry_after=0.2), 429, "1"),
        (NoWorkers(SECRET), 503, "1"),
        (BrokerUnavailable(SECRET), 503, "1"),
        (DeadlineExceeded(SECRET), 504, None),
        (ModelFailed(SECRET), 500, None),
        (WorkerLost(SECRET), 500, None),
        (UnknownService(SECRET), 500, None),
        (ConfigError(SECRET), 500, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MillstreamError) else None,
)
def test_what_is_not_the_caller_s_fault_has_a_status_and_a_code_and_tells_no_more(
    failing: type[Failing], error: MillstreamError, status: int, retry_after: str | None
) -> None:
    example.app.dependency_overrides[example.client_of] = lambda: failing(error)

    answer = ask("a")

    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)
    assert answer.json() == {"code": error.code}


@pytest.mark.parametrize("error", [InvalidRequest("not so", hint="to developers"), InputTooLong("too long")])
def test_what_is_the_caller_s_fault_is_unprocessable_and_says_why(
    failing: type[Failing], error: MillstreamError
) -> None:
    example.app.dependency_overrides[example.client_of] = lambda: failing(error)

    answer = ask("a")

    assert answer.status_code == 422
    assert answer.json() == {"code": error.code, "message": error.message}


def test_texts_that_failed_for_several_reasons_are_worth_a_retry(failing: type[Failing]) -> None:
    rows: dict[int, MillstreamError] = {0: InvalidRequest("not so"), 2: NoWorkers(SECRET)}
    error = PartialFailure("2 of 3", errors=rows, results=[None, 1, None])
    example.app.dependency_overrides[example.client_of] = lambda: failing(error)

    answer = ask("a", "b", "c")

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["errors"] == {
        "0": {"code": "invalid_request", "message": "not so"},
        "2": {"code": "no_workers"},
    }


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(queue: Queue) -> None:
    queue.put_raw({b"body": b"[]"})
    began = time.monotonic()

    answer = ask("one too many")

    assert time.monotonic() - began < example.TIMEOUT_S / 2
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert queue.depth() == 1


def test_without_workers_the_service_is_unavailable(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "TIMEOUT_S", 0.2)

    answer = ask("a")

    assert (answer.status_code, answer.json()) == (503, {"code": "no_workers"})


def test_a_queue_that_is_away_is_unavailable_and_no_reason_to_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_REDIS_URL", "redis://127.0.0.1:1")

    async def look() -> tuple[httpx.Response, httpx.Response]:
        async with browser() as client:
            return await client.get("/healthz"), await client.post("/embed", json={"texts": ["a"]})

    health, answer = asyncio.run(look())

    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (answer.status_code, answer.json()) == (503, {"code": "broker_unavailable"})


# -- callers who leave ---------------------------------------------------------------------------------------------


class Visitor:
    """One ASGI request, whose caller hangs up when told."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.status = 0
        self._asked = False

    async def receive(self) -> MutableMapping[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": json.dumps({"texts": ["a"]}).encode()}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.status = message.get("status", self.status)

    async def visit(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/embed",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await example.app(scope, self.receive, self.send)


def test_the_job_of_a_caller_who_hangs_up_is_cancelled(queue: Queue) -> None:
    async def leave() -> int:
        async with example.lifespan(example.app):
            visitor = Visitor()
            visit = asyncio.create_task(visitor.visit())
            await asyncio.to_thread(eventually, lambda: queue.depth() == 1)
            visitor.leaves.set()
            await asyncio.wait_for(visit, LONG_S)
            await asyncio.to_thread(eventually, lambda: queue.depth() == 0)
            return visitor.status

    assert asyncio.run(leave()) == 499


def test_the_job_of_a_request_that_is_cancelled_is_cancelled_too(queue: Queue) -> None:
    async def cancel() -> None:
        async with browser() as client:
            post = asyncio.create_task(client.post("/embed", json={"texts": ["a"]}))
            await asyncio.to_thread(eventually, lambda: queue.depth() == 1)
            post.cancel()
            await asyncio.wait([post])
            await asyncio.to_thread(eventually, lambda: queue.depth() == 0)

    asyncio.run(cancel())
