"""`millstream doctor --drift` sees another model behind the same name, also if its fingerprint is the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from upstream_stub import Stub, serving
from upstream_workers import working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client

Check = Callable[..., dict[str, str]]


def embedding(name: str, stub: Stub) -> ServiceSpec:
    model = ModelSpec.model_validate({"type": "embedding", "backend": "openai", "url": stub.url, "model_name": "m"})
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime(enable_cache=True))


@pytest.fixture
def check(server: EmbeddedServer, service: str) -> Check:
    """Runs the check. Returns what it finds of vectors, by cause."""

    def run(*words: str) -> dict[str, str]:
        done = CliRunner().invoke(main, ["doctor", service, "--drift", *words, "--json", "--url", server.url])
        found = {each["cause"]: each["what"] for each in json.loads(done.stdout)}
        return {cause: what for cause, what in found.items() if cause.startswith("drift")}

    return run


def test_a_changed_model_is_seen_and_can_be_accepted(
    server: EmbeddedServer, client: Client, service: str, check: Check
) -> None:
    with serving(Stub()) as stub, working(server.url, embedding(service, stub)):
        assert check() == {"drift_kept": "its vectors of fixed texts are kept: the next check compares with them"}
        assert check() == {}

        stub.vector = lambda text: [1.0, float(len(text)), 0.0]
        found = check()
        assert found.keys() == {"drift"}
        assert "the cosine of a fixed text's vectors is 0." in found["drift"]
        assert "the fingerprint of the weights is the same" in found["drift"]
        assert check() == found

        assert check("--accept").keys() == {"drift_kept"}
        assert check() == {}


def test_other_dimensions_are_seen(server: EmbeddedServer, service: str, check: Check) -> None:
    with serving(Stub()) as stub, working(server.url, embedding(service, stub)):
        check()

        stub.vector = lambda text: [float(len(text)), 1.0, 0.0, 0.0]

        assert "they had 3 dimensions, and have 4" in check()["drift"]


def test_a_service_that_cannot_be_checked_is_told_and_others_are_not_called(
    server: EmbeddedServer, connection: Connection, service: str, check: Check
) -> None:
    registry = Registry(connection)
    registry.push([ServiceSpec(name=service, model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime())])
    assert check() == {}
    assert not connection.client.xlen(registry.keys(service).streams()[1])

    with serving(Stub()) as stub:
        registry.push([embedding(service, stub)], replace=True)

    assert check() == {"drift_unknown": "no worker lives: its vectors are not checked"}
    refused = CliRunner().invoke(main, ["doctor", "--accept", "--url", server.url])
    assert (refused.exit_code, "--accept is for --drift" in refused.output) == (2, True)
