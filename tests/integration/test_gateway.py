"""The gateway around its routes: keys, hosts, health, backlogs, outages, drains, and a thousand callers who vanish."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import engines
import httpx
import numpy as np
import openai
import pytest
from bystander import Bystander
from contracts.queue import Queue, draft
from gateways import LONG_S, Running, acting, events, gateway
from support import eventually
from workers import remove, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.job import Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.gateway.api.keys import Key, add_key, digest, new_key, revoke_key
from millstream.gateway.api.settings import check_address

MANY = 1_000


@pytest.fixture(scope="module")
def running(server: EmbeddedServer) -> Iterator[Running]:
    with gateway(server.url) as found:
        yield found


@pytest.fixture
def idle(connection: Connection, service: str) -> Iterator[Queue]:
    """A registered service that nobody serves."""
    Registry(connection).push([spec(service, max_queue_size=2 * MANY)])
    yield Queue(connection.client, ServiceKeys(service))
    connection.client.srem("ms:services", service)


@pytest.fixture(scope="module")
def custom(server: EmbeddedServer) -> Iterator[str]:
    """A service of a user's own code, tests/mill.py."""
    name = f"test-mill-{uuid.uuid4().hex[:8]}"
    model = ModelSpec.model_validate({"type": "custom", "handler": "mill:Mill", "device": "cpu"})
    made = ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime())
    with working(server.url, made, folder=Path(__file__).parents[1]):
        yield name
    remove(server.url, name)


# -- keys ------------------------------------------------------------------------------------------------------------


def make_key(file: Path, name: str, **values: object) -> dict[str, str]:
    """Adds a key to the file, and returns the header that names it."""
    key = new_key()
    add_key(file, Key.model_validate({"name": name, "sha256": digest(key), **values}))
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_needed_and_one_that_is_revoked_is_refused_soon(
    server: EmbeddedServer, tmp_path: Path, echo: str
) -> None:
    file, body = tmp_path / "keys.jsonl", {"model": echo, "input": "a"}
    mine = make_key(file, "mine")
    with gateway(server.url, keys=file, hosts=frozenset()) as running:
        path = f"/v1/services/{echo}"
        none = running.post(path, {"input": "a"})
        wrong = running.post("/v1/embeddings", body, Authorization="Bearer ms-wrong")
        good = running.post(path, {"input": "a"}, **mine)
        probe = running.get("/healthz")
        revoke_key(file, "mine")
        eventually(lambda: running.post(path, {"input": "a"}, **mine).status_code == 401)

    assert (none.status_code, wrong.status_code, probe.status_code) == (401, 401, 200)
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    assert good.json()["output"] == "a"


def test_a_key_allows_its_services_priorities_and_requests_at_once(
    server: EmbeddedServer, tmp_path: Path, echo: str, idle: Queue
) -> None:
    file, name = tmp_path / "keys.jsonl", idle.keys.service
    mine = make_key(file, "mine", services=(name,), highest_priority="normal", max_concurrent=1, tenant="acme")
    with gateway(server.url, keys=file) as running:
        other = running.post("/v1/embeddings", {"model": echo, "input": "a"}, **mine)
        urgent = running.post("/v1/embeddings", {"model": name, "input": "a", "priority": 0}, **mine)
        listed = running.get("/v1/models", **mine).json()
        with running.send("/v1/embeddings", {"model": name, "input": "a"}, **mine):
            eventually(lambda: idle.depth() == 1)
            second = running.post("/v1/embeddings", {"model": name, "input": "a"}, **mine)
            (claim,) = idle.claim().claims
        eventually(lambda: running.post("/v1/embeddings", {"model": name, "input": []}, **mine).status_code == 400)

    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert (urgent.status_code, urgent.json()["error"]["code"]) == (403, "priority_not_allowed")
    assert [each["id"] for each in listed["data"]] == [name]
    assert (second.status_code, second.json()["error"]["code"]) == (429, "too_many_requests")
    assert claim.job
    assert claim.job.tenant == "acme"


def test_a_viewer_looks_and_a_caller_calls(server: EmbeddedServer, tmp_path: Path, echo: str) -> None:
    file = tmp_path / "keys.jsonl"
    viewer, caller = make_key(file, "viewer", role="viewer"), make_key(file, "caller")
    with gateway(server.url, keys=file) as running:
        statuses = [
            (
                running.get(path, **key).status_code,
                running.post(f"/v1/services/{echo}", {"input": 1}, **key).status_code,
            )
            for key, path in ((viewer, "/admin/backlog"), (caller, "/metrics"))
        ]

    assert statuses == [(200, 403), (403, 400)]


def test_without_keys_only_this_host_may_connect_and_only_by_its_names(server: EmbeddedServer) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        check_address("0.0.0.0", False, ())
    hosts = check_address("127.0.0.1", False, ("proxy.example",))
    with gateway(server.url, hosts=hosts) as running:
        statuses = [
            running.get("/v1/models", **headers).status_code
            for headers in (
                {"Host": "evil.example"},
                {"Host": "proxy.example"},
                {"Origin": "https://evil.example"},
                {"Sec-Fetch-Site": "cross-site"},
            )
        ]

    assert statuses == [421, 200, 403, 403]


def test_pages_of_other_sites_may_call_only_if_they_are_allowed(server: EmbeddedServer, tmp_path: Path) -> None:
    file, page = tmp_path / "keys.jsonl", "https://page.example"
    make_key(file, "mine")
    asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
    with gateway(server.url, keys=file) as closed, gateway(server.url, keys=file, origins=(page,)) as opened:
        answers = [httpx.options(f"{each.url}/v1/embeddings", headers=asked) for each in (closed, opened)]

    with gateway(server.url, origins=(page,)) as keyless:
        called = [
            keyless.get("/v1/models", **{"Origin": origin, "Sec-Fetch-Site": "cross-site"}).status_code
            for origin in (page, "https://evil.example")
        ]

    assert "access-control-allow-origin" not in answers[0].headers
    assert answers[1].headers["access-control-allow-origin"] == page
    assert called == [200, 403]


# -- services --------------------------------------------------------------------------------------------------------


def test_a_custom_service_takes_one_payload_or_many(running: Running, custom: str) -> None:
    one = running.post(f"/v1/services/{custom}", {"input": {"n": 3}})
    many = running.post(f"/v1/services/{custom}", {"inputs": [{"n": 1}, {"n": 10**20}]})

    assert one.json()["output"] == 6
    assert many.json()["outputs"] == [2, 2 * 10**20]


def test_a_row_that_fails_fails_its_request_and_is_named(running: Running, custom: str) -> None:
    answer = running.post(f"/v1/services/{custom}", {"inputs": [{"n": 1}, {"n": 1, "do": "error"}]})

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_failed")
    assert "(row 1)" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"input": 1, "inputs": [1]}, {"inputs": []}, {"input": 1, "option": {}}], ids=str)
def test_a_call_of_a_service_that_is_none_is_400(running: Running, custom: str, body: object) -> None:
    assert running.post(f"/v1/services/{custom}", body).status_code == 400


def test_a_service_that_streams_gives_pieces_and_its_result(server: EmbeddedServer, running: Running) -> None:
    name = f"test-stream-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="echo-stream", model_name="sleep:0.01")
    with working(server.url, ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime())):
        *pieces, result, done = events(running.post(f"/v1/services/{name}", {"input": "a b c d", "stream": True}))
        whole = running.post(f"/v1/services/{name}", {"input": "a b"}).json()["output"]
        options = running.post(f"/v1/services/{name}", {"input": "a b", "options": {"max_tokens": 1}}).json()["output"]
    remove(server.url, name)

    assert "".join(each["delta"] for each in pieces) == "a b c d"
    assert (result["output"]["text"], result["output"]["finish_reason"], done) == ("a b c d", "stop", "[DONE]")
    assert (whole["text"], options["text"]) == ("a b", "a ")


# -- once ------------------------------------------------------------------------------------------------------------


def test_a_request_with_an_idempotency_key_runs_once(running: Running, custom: str) -> None:
    key, path = f"key-{uuid.uuid4().hex}", f"/v1/services/{custom}"
    seen = {"input": {"do": "seen"}}

    before = running.post(path, seen).json()["output"][1]
    answers = [running.post(path, {"input": {"n": 4}}, idempotency_key=key).json() for _ in range(3)]
    other = running.post(path, {"input": {"n": 5}}, idempotency_key=key)
    after = running.post(path, seen).json()["output"][1]

    assert [each["output"] for each in answers] == [8, 8, 8]
    assert after - before == 1
    assert other.status_code == 400
    assert "idempotency key" in other.json()["error"]["message"]


# -- for whoever runs it ---------------------------------------------------------------------------------------------


def test_ready_is_a_gateway_that_has_a_live_worker(running: Running, idle: Queue, echo: str) -> None:
    assert running.get("/readyz").status_code == 200
    eventually(lambda: running.get(f"/readyz?service={echo}").status_code == 200)
    nobody = running.get(f"/readyz?service={idle.keys.service}")

    assert (nobody.status_code, nobody.text) == (503, "no live worker\n")


def test_the_backlog_is_seconds_that_an_autoscaler_reads(running: Running, idle: Queue, echo: str) -> None:
    idle.put(draft(), draft(), draft())
    name = idle.keys.service

    eventually(lambda: running.get(f"/admin/backlog/{name}").json().get("waiting") == 3)
    one = running.get(f"/admin/backlog/{name}").json()
    every = running.get("/admin/backlog").json()["services"]

    # Nothing tells how long a job takes: each counts as a second.
    assert (one["backlog_s"], one["in_flight"], one["workers"]) == (3.0, 0, 0)
    assert (every[name]["waiting"], every[echo]["backlog_s"], every[echo]["workers"]) == (3, 0.0, 1)
    assert running.get("/admin/backlog/nothing").status_code == 404


def test_metrics_are_those_of_the_exporter(running: Running, echo: str) -> None:
    page = running.get("/metrics")

    assert page.headers["content-type"].startswith("text/plain")
    assert "millstream_up 1.0" in page.text
    assert f'service="{echo}"' in page.text


# -- the server is away ----------------------------------------------------------------------------------------------


def test_calls_outlast_a_server_that_is_away_up_to_a_bound(tmp_path: Path, server_binary: Path) -> None:
    with (
        EmbeddedServer.start(tmp_path / "data", binary=server_binary, tcp_port=0, appendfsync="everysec") as own,
        working(own.url, spec("docs")),
        gateway(own.url, max_pending=2) as running,
    ):
        assert running.post("/v1/services/docs", {"input": "a"}).status_code == 200
        answers = list[httpx.Response]()

        def call() -> None:
            answers.append(running.post("/v1/services/docs", {"input": "a", "timeout": 60}))

        engines.crash(own)
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: held(running) == 2)
        beyond = running.post("/v1/services/docs", {"input": "a", "timeout": 60})
        unready = running.get("/readyz")
        alive = running.get("/healthz")
        own.restart()
        for thread in threads:
            thread.join(LONG_S)

    assert (beyond.status_code, beyond.headers["retry-after"]) == (503, "1")
    assert beyond.json()["error"]["code"] == "broker_unavailable"
    assert (unready.status_code, alive.status_code) == (503, 200)
    assert [each.json().get("output") for each in answers] == ["a", "a"]


def held(running: Running) -> int:
    """Calls that wait for the server."""
    return running.server.gateway.outage.waiting


def test_an_error_does_not_name_the_queue_s_server(tmp_path: Path) -> None:
    with gateway(f"unix://{tmp_path}/secret.sock") as running:
        answer = running.post("/v1/embeddings", {"model": "docs", "input": "a", "timeout": 0.5})

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "broker_unavailable")
    assert "secret" not in answer.text


# -- callers who vanish, and a gateway that stops --------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_thousand_callers_who_vanish_leave_no_job(
    running: Running, idle: Queue, connection: Connection, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams have begun: they send comments, since their texts have not."""
    monkeypatch.setattr("millstream.gateway.api.streaming.PING_S", 0.2)
    name = idle.keys.service
    body: dict[str, object] = {"model": name, "input": "a"}
    if streams:
        model = ModelSpec(type="llm", model_name="m")
        runtime = Runtime(max_queue_size=2 * MANY, rate_limit=None)
        Registry(connection).push([ServiceSpec(name=name, model=model, model_ref="m", runtime=runtime)], replace=True)
        body = {"model": name, "prompt": "a", "stream": True}
    with ExitStack() as leaving:
        for _ in range(MANY):
            leaving.enter_context(running.send("/v1/completions" if streams else "/v1/embeddings", body))
        eventually(lambda: idle.depth() == MANY, within_s=LONG_S)

    eventually(lambda: idle.depth() == 0, within_s=LONG_S)


def test_a_gateway_that_stops_answers_open_requests_and_takes_no_new_ones(
    server: EmbeddedServer, bystander: Callable[..., Bystander], service: str
) -> None:
    worker = bystander()
    worker.live()
    answers = list[httpx.Response]()
    with gateway(server.url, drain_s=30.0) as running:

        def call() -> None:
            answers.append(running.post("/v1/embeddings", {"model": service, "input": "a"}))

        with acting(call):
            (claim,) = worker.claim(1)
            running.server.stop()
            eventually(lambda: refuses(running))
            worker.settle(claim, Reply(vectors=np.ones((1, 3), np.float32)))

    assert answers[0].status_code == 200
    assert answers[0].json()["data"][0]["embedding"] == [1.0] * 3


def refuses(running: Running) -> bool:
    try:
        running.get("/healthz")
    except httpx.TransportError:
        return True
    return False


def test_a_priority_and_a_deadline_come_from_headers_and_the_library_s_time_out(running: Running, idle: Queue) -> None:
    name = idle.keys.service
    began = time.time()
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30.0) as client,
        acting(lambda: client.embeddings.create(model=name, input="a", extra_headers={"x-priority": "batch"})),
    ):
        eventually(lambda: idle.depth() == 1)
        (claim,) = idle.claim().claims
        idle.settle([claim], encode_reply(Reply(vectors=np.ones((1, 3), np.float32))))

    assert claim.address.name.startswith("3:")
    assert claim.job
    assert claim.job.deadline
    assert 25.0 < claim.job.deadline / 1000 - began < 30.0


def test_the_keys_of_a_gateway_are_json_with_hashes_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    header = make_key(file, "mine", tenant="acme")["Authorization"].removeprefix("Bearer ")

    (line,) = file.read_text().splitlines()
    assert json.loads(line) == {"name": "mine", "sha256": digest(header), "tenant": "acme"}
    assert header not in line
    assert file.stat().st_mode & 0o777 == 0o600
