"""Embeddings over HTTP, with OpenAI's own client library: answers, errors, retries, and callers who leave."""

from __future__ import annotations

import base64
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from bystander import Bystander
from contracts.queue import Queue, draft
from gateways import LONG_S, Running, gateway
from support import eventually
from workers import remove, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.job import Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client.calls import Calls
from millstream.client.handle import Handle
from millstream.gateway.api import bodies

DIMENSION = 8


@pytest.fixture(scope="module")
def running(server: EmbeddedServer) -> Iterator[Running]:
    with gateway(server.url) as found:
        yield found


@pytest.fixture(scope="module")
def embedder(server: EmbeddedServer) -> Iterator[str]:
    """A service that answers each text with ones, and runs 64 rows at once."""
    name = f"test-embed-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="echo", model_name=f"vector:{DIMENSION},raise:stone")
    made = ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime(batch_size=64, max_queue_size=1_000))
    with working(server.url, made):
        yield name
    remove(server.url, name)


@pytest.fixture
def idle(connection: Connection, service: str) -> Iterator[Queue]:
    """A registered service that nobody serves, with room for two jobs of a priority."""
    Registry(connection).push([spec(service, max_queue_size=2)])
    yield Queue(connection.client, ServiceKeys(service))
    connection.client.srem("ms:services", service)


@pytest.fixture
def sdk(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# -- answers ---------------------------------------------------------------------------------------------------------


def test_the_library_s_default_is_base64_of_little_endian_float32(
    running: Running, sdk: openai.OpenAI, embedder: str
) -> None:
    found = sdk.embeddings.create(model=embedder, input=["a mill", "a stream"])
    sent = running.post("/v1/embeddings", {"model": embedder, "input": "a mill", "encoding_format": "base64"}).json()

    assert [each.embedding for each in found.data] == [[1.0] * DIMENSION] * 2
    assert (found.model, [each.index for each in found.data], found.usage.prompt_tokens) == (embedder, [0, 1], 4)
    vector = np.frombuffer(base64.b64decode(sent["data"][0]["embedding"]), "<f4")
    assert vector.tolist() == [1.0] * DIMENSION


def test_numbers_are_lists_and_an_answer_says_how_long_it_took(running: Running, embedder: str) -> None:
    answer = running.post("/v1/embeddings", {"model": embedder, "input": "a mill"}, x_request_id="mine-1")

    assert answer.json()["data"][0]["embedding"] == [1.0] * DIMENSION
    assert float(answer.headers["x-queue-ms"]) >= 0
    assert float(answer.headers["x-inference-ms"]) >= 0
    assert answer.headers["x-request-id"] == "mine-1"


def test_a_large_request_is_split_and_written_off_the_event_loop(
    sdk: openai.OpenAI, embedder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, write, threads = Calls.begin, bodies.to_json, list[str]()

    def begin_here(calls: Calls, *args: Any) -> Handle:
        threads.append(threading.current_thread().name)
        return begin(calls, *args)

    def write_here(value: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return write(value)

    monkeypatch.setattr(Calls, "begin", begin_here)
    monkeypatch.setattr(bodies, "to_json", write_here)
    texts = [f"text {n} of the mill on the stream" for n in range(2_048)]

    small = sdk.embeddings.create(model=embedder, input="a")
    (loop,) = set(threads)
    threads.clear()
    large = sdk.embeddings.create(model=embedder, input=texts)

    assert (len(small.data), len(large.data)) == (1, len(texts))
    assert len(threads) == 2
    assert loop not in threads


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2], [3]]], ids=str)
def test_token_ids_are_refused_with_a_way_out(sdk: openai.OpenAI, embedder: str, given: list[int]) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as caught:
        sdk.embeddings.create(model=embedder, input=given)

    assert (caught.value.code, caught.value.param) == ("token_ids_not_supported", "input")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": []}, 400, "invalid_request", "input"),
        ({"input": "a", "temprature": 1}, 400, "invalid_request", "temprature"),
        ({"input": "a", "priority": "soon"}, 400, "invalid_request", "priority"),
        ({"input": "a", "timeout": -1}, 400, "invalid_request", "timeout"),
        ({"input": "a", "model": "no-such-model"}, 404, "model_not_found", "model"),
        ({"input": "a", "model": "a b"}, 404, "model_not_found", "model"),
        ({"input": "a" * 600_000}, 400, "context_length_exceeded", None),
        ({"input": ["a", "a stone"]}, 500, "model_failed", None),
        ([1], 400, "invalid_request", "body"),
    ],
)
def test_errors_have_status_code_and_field(
    running: Running, embedder: str, body: object, status: int, code: str, param: str | None
) -> None:
    named = {"model": embedder, **body} if isinstance(body, dict) else body

    answer = running.post("/v1/embeddings", named)

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/embeddings", b"{", 400, "invalid_request"),
        ("POST", "/v1/embeddings", b'{"input": "\\ud800"}', 400, "invalid_request"),
        ("POST", "/v1/embeddings", b" " * 20_000, 413, "request_too_large"),
        ("GET", "/v1/embeddings", b"", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", b"", 404, "unknown_path"),
        ("POST", "/v1/responses", b"{}", 404, "unknown_path"),
    ],
)
def test_what_is_no_request_has_an_error_of_the_same_shape(
    server: EmbeddedServer, method: str, path: str, body: bytes, status: int, code: str
) -> None:
    with gateway(server.url, max_body=10_000) as running:
        answer = httpx.request(method, f"{running.url}{path}", content=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_without_a_length_is_limited_too(server: EmbeddedServer) -> None:
    with gateway(server.url, max_body=10_000) as running:
        answer = httpx.post(f"{running.url}/v1/embeddings", content=iter([b" " * 6_000] * 2))

    assert answer.status_code == 413


def test_a_full_queue_is_429_with_a_time_to_retry(idle: Queue, running: Running, sdk: openai.OpenAI) -> None:
    name = idle.keys.service
    idle.put(draft(), draft())

    with pytest.raises(openai.RateLimitError) as caught:
        sdk.embeddings.create(model=name, input="a")

    headers = caught.value.response.headers
    assert (caught.value.code, headers["x-should-retry"]) == ("queue_full", "true")
    assert 1 <= int(headers["retry-after"]) <= 120
    assert int(headers["retry-after-ms"]) <= 120_000


def test_the_library_retries_a_full_queue_and_then_gets_its_answer(
    bystander: Callable[..., Bystander], service: str, running: Running
) -> None:
    worker = bystander(max_queue_size=1)
    worker.live()
    worker.queue.put(draft())
    vectors: list[list[float]] = []

    def embed() -> None:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=5) as client:
            found = client.embeddings.create(model=service, input="a")
            vectors.extend(each.embedding for each in found.data)

    calling = threading.Thread(target=embed)
    calling.start()
    eventually(lambda: worker.queue.view().refused.get("queue_full"))
    (first,) = worker.claim(1)
    worker.queue.settle([first])
    (again,) = worker.claim(1)
    reply = Reply(vectors=np.ones((1, 3), np.float32))
    worker.queue.streams.settle([Settlement(again.address, encode_reply(reply))])
    calling.join(LONG_S)

    assert vectors == [[1.0] * 3]


def test_a_deadline_is_504_and_not_to_be_retried(idle: Queue, running: Running) -> None:
    answer = running.post("/v1/embeddings", {"model": idle.keys.service, "input": "a", "timeout": 0.3})

    # Nobody serves it, and the error says so.
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_workers")
    assert idle.depth() == 0


# -- callers who leave -----------------------------------------------------------------------------------------------


def test_the_job_of_a_caller_who_leaves_is_cancelled(idle: Queue, running: Running) -> None:
    with running.send("/v1/embeddings", {"model": idle.keys.service, "input": "a"}):
        eventually(lambda: idle.depth() == 1)

    eventually(lambda: idle.depth() == 0)
