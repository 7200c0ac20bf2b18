"""The image's health check is healthy exactly while a worker of its own container beats."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


@pytest.fixture
def lease(connection: Connection, service: str) -> Iterator[Lease]:
    """Of a registered service without workers."""
    spec = ServiceSpec(name=service, model=ModelSpec(type="echo"), model_ref="m", runtime=Runtime())
    Registry(connection).push([spec])
    yield Lease(connection.client, ServiceKeys(service))
    connection.client.srem("ms:services", service)


def healthy(url: str, folder: Path) -> bool:
    """What the Dockerfile's shell line says, with this environment's `millstream` on the PATH."""
    (line,) = re.findall(r"^HEALTHCHECK[^\\]*\\\n\s*CMD (.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "MILLSTREAM_REDIS_URL": url}
    done = subprocess.run(["sh", "-c", line], cwd=folder, env=environ, check=False, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode == 0


def test_a_container_is_healthy_while_its_worker_beats(server: EmbeddedServer, lease: Lease, tmp_path: Path) -> None:
    lease.beat("ours", {"host": socket.gethostname()}, [])

    assert healthy(server.url, tmp_path)


def test_a_container_is_not_healthy_by_the_workers_of_others(
    server: EmbeddedServer, lease: Lease, tmp_path: Path
) -> None:
    lease.beat("theirs", {"host": f"{socket.gethostname()}-2"}, [])

    assert not healthy(server.url, tmp_path)
