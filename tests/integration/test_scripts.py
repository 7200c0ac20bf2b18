"""The scripts keep their contracts on real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.cancel import CancelContract
from contracts.claim import ClaimContract
from contracts.dead import DeadLettersContract
from contracts.enqueue import EnqueueContract
from contracts.lease import BeatContract, ReclaimContract, ReleaseContract
from contracts.pause import PauseContract, PurgeContract
from contracts.queue import Queue
from contracts.rate import RateContract
from contracts.settle import SettleContract

from millstream.broker.connection import Connection
from millstream.broker.embedded import EmbeddedServer
from millstream.broker.keys import ServiceKeys


@pytest.fixture(scope="module")
def redis7_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    found = shutil.which("redis-server")
    if found is None:
        pytest.fail("no redis-server: apt install redis-server")
    with EmbeddedServer.start(tmp_path_factory.mktemp("redis7"), binary=Path(found)) as running:
        assert running.engine == "redis"
        yield running


@pytest.fixture(params=["server", pytest.param("redis7_server", marks=pytest.mark.redis7)])
def connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """Valkey and Debian's Redis in turn."""
    server: EmbeddedServer = request.getfixturevalue(request.param)
    opened = Connection(server.url, name="tests")
    yield opened
    opened.close()


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open()
    return opened


class TestEnqueue(EnqueueContract):
    pass


class TestRate(RateContract):
    pass


class TestClaim(ClaimContract):
    pass


class TestSettle(SettleContract):
    pass


class TestBeat(BeatContract):
    pass


class TestRelease(ReleaseContract):
    pass


class TestReclaim(ReclaimContract):
    pass


class TestCancel(CancelContract):
    pass


class TestPause(PauseContract):
    pass


class TestPurge(PurgeContract):
    pass


class TestDeadLetters(DeadLettersContract):
    pass
