"""Workers of two supervisors on one host: together they compute on its cores once."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from support import eventually
from workers import remove, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.inspector import Inspector
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker.measuring.cores import cores


def test_workers_started_separately_share_the_hosts_cores(
    server: EmbeddedServer, tiny_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' own environment says how many threads there are, and how they wait.
    for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    name = f"test-cores-{uuid.uuid4().hex[:8]}"
    model = ModelSpec(type="embedding", model_name=str(tiny_model), device="cpu")
    spec = ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime.model_validate({}))
    connection = Connection(server.url, name="tests")

    def threads() -> list[int]:
        return [worker.threads for worker in Inspector(connection).services([name])[0].workers]

    with working(server.url, spec), working(server.url, spec), Client(server.url) as client:

        def shared() -> bool:
            # A worker changes its threads before a forward, in its own time.
            client.submit(name, ["a mill"] * 50).result(timeout=30)
            return len(threads()) == 2 and sum(threads()) <= max(2, cores())

        eventually(shared, within_s=30)

    said = capfd.readouterr().err
    assert "GOMP_SPINCOUNT=3000" in said
    assert " with 1 thread" in said or "(measured)" in said
    remove(server.url, name)
    connection.close()
