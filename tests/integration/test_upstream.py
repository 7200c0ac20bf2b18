"""Services whose models a server of their own runs: nothing is lost, and two workers share the server's limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from support import eventually
from upstream_stub import Stub, serving
from workers import LONG_S, remove

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.keys import upstream_key
from millstream.broker.contract.operations import ModelType
from millstream.broker.contract.slots import Demand
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.slots import SharedSlots
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker.supervision.supervisor import Plan, Supervisor

Work = Callable[..., Supervisor]


def made(name: str, stub: Stub, kind: ModelType = "llm", **runtime: object) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": kind, "backend": "openai", "url": stub.url, "model_name": "m"})
    settings = Runtime.model_validate({"batch_size": 4, "total_timeout": 60.0, **runtime})
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=settings)


@contextmanager
def working(url: str, spec: ServiceSpec, workers: int = 1) -> Iterator[Supervisor]:
    connection = Connection(url, name="tests")
    Registry(connection).push([spec])
    supervisor = Supervisor(url, "ms", [Plan(spec, workers)], drain_s=5.0)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        eventually(lambda: supervisor.ready == workers, within_s=LONG_S)
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(LONG_S)
        assert spec.model.url
        connection.client.unlink(upstream_key(spec.model.url))
        connection.close()
        remove(url, spec.name)


def states(url: str, service: str) -> list[str]:
    connection = Connection(url, name="tests")
    try:
        (view,) = [each for each in Inspector(connection, "ms").services() if each.name == service]
        return [worker.state for worker in view.workers]
    finally:
        connection.close()


def pids(url: str, service: str) -> list[int]:
    connection = Connection(url, name="tests")
    try:
        (view,) = [each for each in Inspector(connection, "ms").services() if each.name == service]
        return [worker.pid for worker in view.workers]
    finally:
        connection.close()


def whole(head: str, words: int) -> str:
    return "".join(f"{head}{n} " for n in range(words))


def test_texts_vectors_and_errors_pass_through(server: EmbeddedServer, client: Client, service: str) -> None:
    with serving(Stub(step_s=0.02)) as stub, working(server.url, made(service, stub)):
        stream = client.stream(service, "a:", max_tokens=6)
        pieces = list(stream)
        assert "".join(pieces) == stream.text == whole("a", 6)
        assert len(pieces) > 1
        assert stream.finish_reason == "length"
        stub.refuse = lambda body: 400
        with pytest.raises(InvalidRequest, match="the input is too long"):
            list(client.stream(service, "a:"))


def test_rows_of_one_call_are_embedded_in_few_requests(server: EmbeddedServer, client: Client, service: str) -> None:
    with serving(Stub(step_s=0.02)) as stub, working(server.url, made(service, stub, "embedding", batch_size=8)):
        vectors = client.embed(["x" * n for n in range(1, 41)], service=service)

        assert [vector[0] for vector in np.asarray(vectors).tolist()] == [float(n) for n in range(1, 41)]
        assert len(stub.requests) < 40
        assert vectors.usage["tokens"] == 5 * 40


def test_a_worker_that_is_killed_in_the_middle_loses_no_text(
    server: EmbeddedServer, client: Client, service: str
) -> None:
    with serving(Stub(words=30, step_s=0.05)) as stub, working(server.url, made(service, stub)):
        stream = client.stream(service, "a:")
        begun = [next(stream) for _ in range(3)]
        (pid,) = pids(server.url, service)
        os.kill(pid, signal.SIGKILL)

        assert "".join([*begun, *stream]) == whole("a", 30)
        assert len(stub.requests) == 2
        assert stub.requests[1][1]["prompt"].startswith("a:a0 a1 a2 ")


def test_a_cancelled_call_closes_its_request(server: EmbeddedServer, client: Client, service: str) -> None:
    with serving(Stub(words=1_000, step_s=0.02)) as stub, working(server.url, made(service, stub)):
        stream = client.stream(service, "a:")
        next(stream)
        stream.close()

        eventually(lambda: stub.running == 0 and stub.hung_up == 1, within_s=LONG_S)


def test_a_server_that_is_away_is_shown_and_its_jobs_wait_for_it(
    server: EmbeddedServer, client: Client, service: str
) -> None:
    stub = Stub(words=20, step_s=0.05)
    with serving(stub):
        port = int(stub.url.split(":")[2].split("/")[0])
        spec = made(service, stub)
        work = working(server.url, spec)
        work.__enter__()
        streams = [client.stream(service, f"{letter}:") for letter in "abcdef"]
        begun = next(streams[0])
    try:
        eventually(lambda: states(server.url, service) == ["away"], within_s=LONG_S)
        with serving(stub, port):
            texts = ["".join(stream) for stream in streams]
            assert [begun + texts[0], *texts[1:]] == [whole(letter, 20) for letter in "abcdef"]
            eventually(lambda: states(server.url, service) == ["ready"], within_s=LONG_S)
    finally:
        work.__exit__(None, None, None)


def test_a_server_that_refuses_requests_fails_no_job(server: EmbeddedServer, client: Client, service: str) -> None:
    with serving(Stub(limit=1, step_s=0.01)) as stub, working(server.url, made(service, stub), workers=2):
        streams = [client.stream(service, f"p{n}:") for n in range(30)]

        assert ["".join(stream) for stream in streams] == [whole(f"p{n}", 8) for n in range(30)]
        assert stub.most == 1


@pytest.mark.alone
def test_two_workers_find_a_hidden_limit_together_and_stay_there(
    server: EmbeddedServer, client: Client, service: str
) -> None:
    stub = Stub(limit=4, words=4, step_s=0.05)
    with serving(stub), working(server.url, made(service, stub, max_queue_size=10_000), workers=2):
        over = threading.Event()

        def call() -> None:
            while not over.is_set():
                assert "".join(client.stream(service, "a:")) == whole("a", 4)

        threads = [threading.Thread(target=call) for _ in range(40)]
        for each in threads:
            each.start()
        try:
            for limit in (4, 12):
                stub.limit = limit
                time.sleep(25.0)
                begun, refused, requests = time.monotonic(), stub.refused, len(stub.requests)
                time.sleep(10.0)
                mean = mean_running(stub, begun, time.monotonic())
                assert 0.8 * limit <= mean <= limit, (limit, mean)
                assert stub.refused - refused < 0.2 * (len(stub.requests) - requests)
        finally:
            over.set()
            for each in threads:
                each.join(LONG_S)


def mean_running(stub: Stub, begun: float, end: float) -> float:
    """Mean number of requests that the stub ran between two times."""
    total, last, running = 0.0, begun, 0
    for at, now_running in list(stub.ran):
        if begun < at < end:
            total += running * (at - last)
            last = at
        running = now_running
    return (total + running * (end - last)) / (end - begun)


# -- the key that workers share ------------------------------------------------------------------------------------

URL = "http://nowhere:1/v1"


@pytest.fixture
def shared(connection: Connection) -> Iterator[Callable[[str], SharedSlots]]:
    yield lambda consumer: SharedSlots(connection.client, URL, consumer)
    connection.client.unlink(upstream_key(URL))


def test_workers_see_each_others_requests(connection: Connection, shared: Callable[[str], SharedSlots]) -> None:
    shared("a").exchange(Demand(2, 1), 0, "")
    seen = shared("b").exchange(Demand(3, 0), 0, "")

    assert seen.workers == {"a": Demand(2, 1), "b": Demand(3, 0)}
    assert (seen.version, seen.state) == (0, "")
    assert 0 < connection.client.pttl(upstream_key(URL)) <= 3_600_000
    shared("a").leave()
    assert shared("b").exchange(Demand(3, 0), 0, "").workers == {"b": Demand(3, 0)}


def test_of_two_changes_to_the_same_state_one_is_written(shared: Callable[[str], SharedSlots]) -> None:
    first = shared("a").exchange(Demand(1, 0), 0, "one")
    second = shared("b").exchange(Demand(1, 0), 0, "two")
    third = shared("b").exchange(Demand(1, 0), second.version, "three")

    assert [(each.version, each.state) for each in (first, second, third)] == [(1, "one"), (1, "one"), (2, "three")]


def test_a_dead_workers_requests_count_for_one_lease(
    shared: Callable[[str], SharedSlots], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.broker.queue.slots.LEASE_MS", 100)
    shared("dead").exchange(Demand(9, 9), 0, "")
    time.sleep(0.15)

    assert list(shared("b").exchange(Demand(1, 0), 0, "").workers) == ["b"]
