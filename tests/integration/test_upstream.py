"""Services whose models a server of their own runs: nothing is lost, and two workers share the server's limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import eventually
from upstream_stub import Stub, serving
from upstream_workers import pids, state, states, working
from workers import LONG_S

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest
from millstream.broker.contract.operations import ModelType
from millstream.broker.server.embedded import EmbeddedServer
from millstream.client import Client


def made(name: str, stub: Stub, kind: ModelType = "llm", **runtime: object) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": kind, "backend": "openai", "url": stub.url, "model_name": "m"})
    settings = Runtime.model_validate({"batch_size": 4, "total_timeout": 60.0, **runtime})
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=settings)


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


def test_a_worker_serves_where_no_torch_can_be_imported(
    server: EmbeddedServer, client: Client, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("torch", "transformers", "sentence_transformers"):
        (tmp_path / f"{library}.py").write_text('raise ImportError("not installed")')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with serving(Stub()) as stub, working(server.url, made(service, stub, "embedding")):
        assert np.asarray(client.embed(["abc"], service=service)).tolist() == [[3.0, 1.0, 0.0]]


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
@pytest.mark.skipif(os.environ.get("MILLSTREAM_LONG") != "1", reason="MILLSTREAM_LONG is not 1: it takes 80 s")
def test_two_workers_find_a_hidden_limit_together_and_stay_there(
    server: EmbeddedServer, client: Client, service: str
) -> None:
    # A text takes 0.8 s: between two of them a slot is empty for the few hundredths of a second of a claim.
    stub = Stub(limit=4, words=16, step_s=0.05)
    with serving(stub), working(server.url, made(service, stub, max_queue_size=10_000), workers=2):
        over = threading.Event()

        def call() -> None:
            while not over.is_set():
                assert "".join(client.stream(service, "a:")) == whole("a", 16)

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
                assert 0.8 * limit <= mean <= limit, (limit, mean, state(server.url, stub.url))
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
