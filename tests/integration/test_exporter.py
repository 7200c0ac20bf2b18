"""The exporter's counters are those of a ledger, whatever dies meanwhile, and it outlives the server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scrapes import exporting, fetch
from support import eventually
from workers import LONG_S, spec, working

from millstream.broker.config.spec import ModelSpec, PriorityName, ServiceSpec
from millstream.broker.contract.errors import MillstreamError, PartialFailure, QueueFull, ServicePaused
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.pause import pause, resume
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.client.handle import Handle
from millstream.worker.supervision.supervisor import Supervisor

CALLS, ROWS = 120, 3
MOST_REALTIME = 4


class Ledger:
    """What callers of one service were told, by its own count."""

    def __init__(self, client: Client, service: str) -> None:
        self._client = client
        self._service = service
        self.jobs = self.ok = 0
        self.failed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def send(self, *texts: str, priority: PriorityName = "normal") -> Callable[[], None]:
        """Sends a call, which is one job. The function waits for its answer and enters it."""
        self.jobs += 1
        handle = self._client.submit(self._service, texts, priority=priority)
        return lambda: self._enter(handle, len(texts))

    def cancel(self, *texts: str) -> None:
        self.jobs += 1
        handle = self._client.submit(self._service, texts)
        handle.cancel()
        self._enter(handle, len(texts))

    def refuse(self, reason: str, priority: PriorityName = "normal") -> None:
        """Makes a call that is refused."""
        error = {"paused": ServicePaused, "queue_full": QueueFull}[reason]
        with pytest.raises(error):
            self._client.submit(self._service, ["refused"], priority=priority, wait=False).result(timeout=LONG_S)
        self.refused[reason] += 1

    def _enter(self, handle: Handle, rows: int) -> None:
        try:
            self.ok += len(handle.result(timeout=LONG_S))
        except PartialFailure as failure:
            self.failed.update(error.code for error in failure.errors.values())
            self.ok += rows - len(failure.errors)
        except MillstreamError as error:
            self.failed[error.code] += rows


def run(ledger: Ledger, supervisor: Supervisor, connection: Connection, keys: ServiceKeys) -> None:
    """A run of known size: workers are killed twice, and a poison job kills two more."""
    calls = [
        (f"text {call} a", f"text {call} b", f"text {call} {'bad' if call % 10 == 0 else 'c'}") for call in range(CALLS)
    ]
    pause(connection.client, keys)
    waiting = [ledger.send(f"urgent {number}", priority="realtime") for number in range(MOST_REALTIME)]
    for _ in range(3):
        ledger.refuse("queue_full", "realtime")
    ledger.cancel("cancelled a", "cancelled b")
    pause(connection.client, keys, refusing=True)
    for _ in range(2):
        ledger.refuse("paused")
    pause(connection.client, keys)
    waiting += [ledger.send(*texts) for texts in calls]
    resume(connection.client, keys)
    for part in (waiting[: CALLS // 2], waiting[CALLS // 2 :]):
        part[0]()
        os.kill(supervisor.pids[0], signal.SIGKILL)
        for enter in part[1:]:
            enter()
    ledger.send("die", "beside it")()


@pytest.fixture
def limited(service: str) -> ServiceSpec:
    plain = spec(
        service,
        batch_size=8,
        enable_cache=True,
        max_attempts=2,
        priorities={"realtime": {"max_queue_size": MOST_REALTIME}},
    )
    return plain.model_copy(update={"model": ModelSpec(type="echo", model_name="sleep:0.02,crash:die,raise:bad")})


def test_the_counters_equal_the_ledger_of_a_run_whose_workers_were_killed(
    server: EmbeddedServer, connection: Connection, client: Client, limited: ServiceSpec
) -> None:
    service, keys = limited.name, ServiceKeys(limited.name)
    ledger = Ledger(client, service)

    with working(server.url, limited, processes=2) as supervisor, exporting(server.url) as port:
        run(ledger, supervisor, connection, keys)
        assert supervisor.restarts == 4
        again = client.submit(service, [f"text {call} a" for call in range(CALLS)])
        assert len(again.result(timeout=LONG_S)) == CALLS
        eventually(lambda: client.stats(service).cached == CALLS)
        scrape = fetch(port)
        stats = client.stats(service)
    connection.client.srem("ms:services", service)

    def value(name: str) -> float:
        return scrape.value(f"millstream_{name}", service=service)

    def by(label: str, name: str) -> dict[str, float]:
        return scrape.by(label, f"millstream_{name}", service=service)

    rows = ledger.ok + sum(ledger.failed.values())
    assert rows == MOST_REALTIME + 3 * CALLS + 2 + 2
    assert by("priority", "jobs_accepted_total") == {"realtime": MOST_REALTIME, "normal": ledger.jobs - MOST_REALTIME}
    assert value("jobs_settled_total") == ledger.jobs
    assert value("rows_accepted_total") == rows
    assert value("rows_answered_total") == ledger.ok
    assert (
        by("code", "rows_failed_total")
        == ledger.failed
        == {"model_failed": CALLS // 10, "cancelled": 2, "worker_lost": 2}
    )
    assert by("reason", "calls_refused_total") == ledger.refused == {"queue_full": 3, "paused": 2}
    assert by("reason", "jobs_buried_total") == {"max_attempts": 1}
    assert value("dead_letters") == 1
    assert value("rows_cached_total") == CALLS
    assert (stats.ok, stats.failed, stats.refused, stats.cached) == (ledger.ok, ledger.failed, ledger.refused, CALLS)


def test_the_exporter_outlives_the_server_and_says_so_once(
    tmp_path: Path, server_binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedServer.start(tmp_path, binary=server_binary) as server:
        url = server.url
        with exporting(url) as port:
            assert fetch(port).value("millstream_up") == 1
            server.stop()
            with ThreadPoolExecutor() as threads:
                away = list(threads.map(lambda _: fetch(port), range(8)))
            with EmbeddedServer.start(tmp_path, binary=server_binary):
                back = fetch(port)

    assert [scrape.value("millstream_up") for scrape in away] == [0] * 8
    assert [len(scrape.samples) for scrape in away] == [1] * 8
    assert back.value("millstream_up") == 1
    lost, found = (record.getMessage() for record in caplog.records if "telemetry" in record.name)
    assert "cannot be reached" in lost
    assert found == "the services can be read again"


def test_the_command_serves_until_it_is_told_to_end_also_while_the_server_is_away(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "millstream.cli.main",
        "exporter",
        "--url",
        f"unix://{tmp_path}/no.sock",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/metrics$", said)
        assert port, said
        scrape = fetch(int(port[1]))
        process.terminate()
        assert process.wait(LONG_S) == 0
        log = process.stderr.read()

    assert scrape.value("millstream_up") == 0
    assert log.startswith("millstream: the services cannot be read, so millstream_up is 0: ")
    assert len(log.splitlines()) == 1
