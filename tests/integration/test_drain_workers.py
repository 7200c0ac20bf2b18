"""`millstream worker drain`, `stop` and `start` with real processes: nothing is lost, and nothing starts unbidden."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner, Result
from support import eventually
from workers import remove, spec

from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client
from millstream.worker.supervision import registrar
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

LONG_S = 60.0
JOBS = 120
"""Of 20 ms each: the workers are amid them when an order comes."""


class Site:
    """A service, its supervisor, and the command line."""

    def __init__(self, server: EmbeddedServer, connection: Connection, name: str) -> None:
        self.spec = spec(name, forward_s=0.02, batch_size=1, max_queue_size=2 * JOBS)
        self.url = server.url
        self._inspector = Inspector(connection)
        Registry(connection).push([self.spec])

    @contextmanager
    def supervised(self, count: int) -> Iterator[Supervisor]:
        supervisor = Supervisor(self.url, "ms", [Plan(self.spec, count)], drain_s=10.0)
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        try:
            yield supervisor
        finally:
            supervisor.stop()
            thread.join(LONG_S)

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(main, ["worker", *words, "--url", self.url])

    @property
    def view(self) -> ServiceView:
        return self._inspector.services([self.spec.name])[0]

    def workers(self) -> list[str]:
        return sorted(worker.consumer for worker in self.view.workers)

    def await_workers(self, count: int) -> list[str]:
        eventually(lambda: len(self.workers()) == count, within_s=LONG_S)
        return self.workers()

    def await_work(self, workers: list[str]) -> None:
        """Until each of `workers` holds jobs."""
        eventually(lambda: all(self.view.held.get(name) for name in workers), within_s=LONG_S)


@pytest.fixture
def site(
    server: EmbeddedServer, connection: Connection, service: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setattr(registrar, "LOOK_S", 0.1)
    yield Site(server, connection, service)
    remove(server.url, service)


def test_drained_and_stopped_workers_lose_nothing_and_none_starts_until_it_is_told(site: Site, client: Client) -> None:
    with site.supervised(3) as supervisor:
        drained, stopped, other = site.await_workers(3)
        rows = [str(at) for at in range(JOBS)]
        handles = [client.submit(site.spec.name, [row]) for row in rows]
        site.await_work([drained, stopped, other])

        answers = [site.run("drain", drained), site.run("stop", stopped)]

        assert [(answer.exit_code, answer.stderr) for answer in answers] == [(0, ""), (0, "")]
        assert f"{drained}: draining 1 worker of {site.spec.name}\n" in answers[0].stdout
        assert site.workers() == [other]
        assert [handle.result(LONG_S)[0] for handle in handles] == rows
        eventually(lambda: site.view.in_flight == 0)
        assert (supervisor.drained, supervisor.restarts, site.view.dead_letters) == (2, 0, 0)
        eventually(lambda: site.view.supervisors[0].state.drained == 2)
        assert site.workers() == [other]

        assert site.run("start", drained).exit_code == 0

        assert len(site.await_workers(2)) == 2
        assert supervisor.drained == 1


def test_a_drained_host_stays_empty_when_its_supervisor_is_restarted(site: Site) -> None:
    with site.supervised(1) as supervisor:
        (worker,) = site.await_workers(1)
        host = site.view.workers[0].host
        _refuse_unknown(site, host, worker)

        drained = site.run("drain", host)

        assert (drained.exit_code, site.workers()) == (0, [])
        assert f"warning: service {site.spec.name} has no other ready worker" in drained.stdout
        assert supervisor.drained == 1
        assert f"kept empty by an operator: {host} ({site.spec.name})" in site.run("ls").stdout

    with site.supervised(1) as supervisor:
        eventually(lambda: [each.state.drained for each in site.view.supervisors] == [1], within_s=LONG_S)
        assert (supervisor.drained, supervisor.pids) == (1, [])

        started = site.run("start", host)

        assert (started.exit_code, started.stderr) == (0, "")
        assert site.await_workers(1) != [worker]


def _refuse_unknown(site: Site, host: str, worker: str) -> None:
    """An unknown place is an error with the names that exist."""
    answer = site.run("drain", "nowhere")

    assert answer.exit_code == 2
    assert answer.stderr.startswith("millstream: no live worker or host 'nowhere' (")
    assert host in answer.stderr
    assert worker in answer.stderr
    assert site.run("start", host).exit_code == 2


@pytest.mark.skipif(not os.environ.get("MILLSTREAM_LONG"), reason="MILLSTREAM_LONG")
def test_a_drain_that_takes_longer_than_the_operator_waits_stays_ordered(site: Site, client: Client) -> None:
    with site.supervised(1) as supervisor:
        (worker,) = site.await_workers(1)
        handles = [client.submit(site.spec.name, [str(at)]) for at in range(JOBS)]
        site.await_work([worker])

        answer = site.run("drain", worker, "--timeout", "1ms")

        assert (answer.exit_code, "still running after 0.001 s; the order stays" in answer.stderr) == (7, True)
        eventually(lambda: supervisor.drained == 1 and not supervisor.pids, within_s=LONG_S)
        assert site.view.depth > 0
        assert site.run("start", worker).exit_code == 0
        assert [handle.result(LONG_S)[0] for handle in handles] == [str(at) for at in range(JOBS)]
