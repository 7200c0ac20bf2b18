"""`millstream doctor` names each trouble that is staged on a real server, also two at once, and no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from contracts.queue import Queue, draft
from e2e.supervisors import supervising
from support import eventually
from workers import LONG_S, spec, working

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import RateLimited
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.pause import pause
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.supervisors import Supervisors, SupervisorState
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.cli.main import main
from millstream.client import Client
from millstream.worker.supervision.plan import Plan


@dataclass
class Mill:
    """A server of its own, with one registered service; `ends` stops what was started."""

    server: EmbeddedServer
    connection: Connection
    spec: ServiceSpec
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    ends: ExitStack

    @property
    def queue(self) -> Queue:
        return Queue(self.connection.client, ServiceKeys(self.spec.name))

    def register(self, spec: ServiceSpec) -> None:
        self.spec = spec
        Registry(self.connection).push([spec], replace=True)

    def work(self) -> None:
        self.ends.enter_context(working(self.server.url, self.spec))

    def causes(self) -> dict[str, str]:
        """What doctor found: the severity of each cause, notes excepted."""
        result = CliRunner().invoke(main, ["doctor", self.spec.name, "--url", self.server.url, "--json"])
        found = {each["cause"]: each["severity"] for each in json.loads(result.stdout) if each["severity"] != "note"}
        assert result.exit_code == (1 if found else 0)
        return found

    def await_causes(self, *causes: str) -> None:
        eventually(lambda: self.causes().keys() == set(causes), within_s=LONG_S)


@pytest.fixture
def mill(tmp_path: Path, server_binary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mill]:
    with (
        EmbeddedServer.start(tmp_path / "data", binary=server_binary, appendfsync="everysec") as server,
        ExitStack() as ends,
    ):
        connection = ends.enter_context(contextlib.closing(Connection(server.url, name="tests")))
        opened = Mill(server, connection, spec("docs"), tmp_path, monkeypatch, ends)
        opened.register(opened.spec)
        yield opened


# -- what is staged --------------------------------------------------------------------------------------------------


def no_worker(mill: Mill) -> None:
    mill.queue.put(draft())


def paused(mill: Mill) -> None:
    pause(mill.connection.client, mill.queue.keys)


def queue_full(mill: Mill) -> None:
    mill.register(mill.spec.model_copy(update={"runtime": Runtime.of("echo", max_queue_size=4)}))
    mill.queue.put(*[draft() for _ in range(4)])


def evicting_policy(mill: Mill) -> None:
    mill.connection.client.config_set("maxmemory-policy", "allkeys-lru")


def clock_skew(mill: Mill) -> None:
    now = time.time
    mill.monkeypatch.setattr("time.time", lambda: now() + 60.0)


def stale_consumer(mill: Mill) -> None:
    """As a host that was lost with its supervisor, and no other takes its jobs."""
    mill.queue.hold("ghost", draft())


def worker_refused(mill: Mill) -> None:
    refuse(mill, "no_such_module:handle")


def refuse(mill: Mill, handler: str) -> None:
    model = ModelSpec.model_validate({"type": "custom", "handler": handler})
    mill.register(ServiceSpec(name="docs", model=model, model_ref="m", runtime=Runtime.of("custom")))
    with supervising(mill.server.url, Plan(mill.spec, 1, folder=str(mill.folder))) as supervision:
        supervision.join()


def wrong_weights(mill: Mill) -> None:
    mill.connection.client.hset(mill.queue.keys.spec(), "fingerprint", "other weights")
    with supervising(mill.server.url, Plan(mill.spec, 1)) as supervision:
        supervision.join()


def dead_supervisor(mill: Mill) -> None:
    words = [sys.executable, "-m", "millstream.cli.main", "worker", "run", "docs", "--url", mill.server.url]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually(lambda: mill.causes() == {}, within_s=LONG_S)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def crash_loop(mill: Mill) -> None:
    (mill.folder / "crashes.py").write_text("import os\nos._exit(7)\n")
    model = ModelSpec.model_validate({"type": "custom", "handler": "crashes:handle"})
    mill.register(ServiceSpec(name="docs", model=model, model_ref="m", runtime=Runtime.of("custom")))
    mill.ends.enter_context(supervising(mill.server.url, Plan(mill.spec, 1, folder=str(mill.folder))))


def too_many_threads(mill: Mill) -> None:
    """Two workers of a host with two cores that run two threads each."""
    host = socket.gethostname()
    for consumer in ("w1", "w2"):
        mill.queue.lease.beat(consumer, {"state": "ready", "host": host, "threads": 2}, [])
    Supervisors(mill.connection.client, mill.queue.keys).publish(SupervisorState(host, 1, 2, 2, cores=2))


Stage = Callable[[Mill], None]
ALONE: dict[Stage, tuple[str, ...]] = {
    no_worker: ("no_worker",),
    paused: ("paused",),
    queue_full: ("queue_full", "no_worker"),
    evicting_policy: ("evicting_policy",),
    clock_skew: ("clock_skew",),
    stale_consumer: ("stale_consumer", "no_worker"),
    worker_refused: ("worker_refused", "no_worker"),
    wrong_weights: ("worker_refused", "no_worker"),
    dead_supervisor: ("dead_supervisor", "no_worker"),
    crash_loop: ("crash_loop", "no_worker"),
    too_many_threads: ("too_many_threads",),
}
"""What is staged -> the causes that doctor names then."""
WITH_A_WORKER = {paused, evicting_policy, clock_skew}


@pytest.mark.parametrize("stage", ALONE, ids=lambda stage: stage.__name__)
def test_each_trouble_is_named(mill: Mill, stage: Stage) -> None:
    if stage in WITH_A_WORKER:
        mill.work()
    stage(mill)

    mill.await_causes(*ALONE[stage])


@pytest.mark.parametrize(
    ("one", "other"),
    [(paused, queue_full), (evicting_policy, stale_consumer), (clock_skew, worker_refused)],
    ids=lambda stage: stage.__name__,
)
def test_two_troubles_at_once_are_both_named(mill: Mill, one: Stage, other: Stage) -> None:
    other(mill)
    one(mill)

    mill.await_causes(*{*ALONE[one], *ALONE[other]})


def test_a_wrong_name_is_answered_with_the_right_one(mill: Mill) -> None:
    result = CliRunner().invoke(main, ["doctor", "dogs", "--url", mill.server.url])

    assert result.exit_code == 4
    assert "did you mean docs?" in result.output


def test_the_reason_why_no_worker_starts_is_told(mill: Mill) -> None:
    worker_refused(mill)

    output = CliRunner().invoke(main, ["doctor", "docs", "--url", mill.server.url]).output

    assert "no_such_module" in output
    assert "millstream worker run docs" in output


def test_a_record_that_cannot_be_read_is_named_and_hides_no_other_service(mill: Mill) -> None:
    Registry(mill.connection).push([spec("other")])
    mill.connection.client.hset(mill.queue.keys.spec(), "spec", "no JSON")

    output = CliRunner().invoke(main, ["doctor", "--url", mill.server.url]).output

    assert "error: service docs: a service's record in Redis cannot be read" in output
    assert "service other: no worker lives" in output


def test_a_service_without_a_record_yet_is_left_out(mill: Mill) -> None:
    mill.connection.client.delete(mill.queue.keys.spec())
    Registry(mill.connection).push([spec("other")])

    output = CliRunner().invoke(main, ["doctor", "--url", mill.server.url]).output

    assert "docs" not in output
    assert "service other: no worker lives" in output


# -- what is well ----------------------------------------------------------------------------------------------------


def backlog(mill: Mill) -> None:
    """A deep queue that a slow worker works off."""
    mill.register(spec("docs", forward_s=0.05, batch_size=2))
    mill.work()
    mill.queue.put(*[draft() for _ in range(200)])


def limited(mill: Mill) -> None:
    """Calls that the rate limit refuses, as it should."""
    mill.register(mill.spec.model_copy(update={"runtime": Runtime.of("echo", rate_limit={"requests": 1.0})}))
    mill.work()
    with Client(mill.server.url) as client:
        client.submit("docs", ["the first"]).result()
        with pytest.raises(RateLimited):
            client.submit("docs", ["one too many"], wait=False).result()


def starting(mill: Mill) -> None:
    """A worker that takes a while to load, and a job that waits for it."""
    (mill.folder / "slow.py").write_text("import time\ntime.sleep(600)\n")
    model = ModelSpec.model_validate({"type": "custom", "handler": "slow:handle"})
    mill.register(ServiceSpec(name="docs", model=model, model_ref="m", runtime=Runtime.of("custom")))
    mill.ends.enter_context(supervising(mill.server.url, Plan(mill.spec, 1, folder=str(mill.folder)), drain_s=0.1))
    eventually(lambda: mill.connection.client.exists(mill.queue.keys.supervisors()), within_s=LONG_S)
    mill.queue.put(draft())


def one_of_two_drains(mill: Mill) -> None:
    """Two workers with jobs in hand, one of which drains, as in a deploy."""
    mill.register(spec("docs", forward_s=0.2, batch_size=1))
    mill.work()
    with supervising(mill.server.url, Plan(mill.spec, 1)) as supervision:
        supervision.ready(1)
        mill.queue.put(*[draft() for _ in range(8)])
        eventually(lambda: len(mill.connection.client.keys("ms:{docs}:worker:*")) == 2, within_s=LONG_S)


def restarted(mill: Mill) -> None:
    """A supervisor was killed, and another one took its place on the same host."""
    mill.work()
    dead = SupervisorState(socket.gethostname(), 1, 1, 1)
    seconds, _ = mill.connection.client.time()
    state = json.dumps(asdict(dead) | {"at": (seconds - 60) * 1000, "clock_ms": 0})
    mill.connection.client.hset(mill.queue.keys.supervisors(), f"{dead.host}:{dead.pid}", state)


@pytest.mark.parametrize(
    "healthy", [backlog, limited, starting, one_of_two_drains, restarted], ids=lambda healthy: healthy.__name__
)
def test_nothing_is_wrong_with_a_system_that_works(mill: Mill, healthy: Callable[[Mill], None]) -> None:
    healthy(mill)

    assert mill.causes() == {}
