"""A server that a test may harm, workers and a client on it, and callers each of whose calls is accounted for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from contracts.queue import Queue
from e2e.watch import Watch, is_stopped
from support import eventually
from workers import LONG_S

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.registry import Registry
from millstream.broker.server.embedded import EmbeddedServer
from millstream.broker.transport.connection import Connection
from millstream.client import Client
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor

SERVICE = "mill"
THREADS = 8


class Callers:
    """Threads that call, one row at a time, until they are stopped."""

    def __init__(self, client: Client, threads: int = THREADS) -> None:
        self._client = client
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call_on, args=[lane]) for lane in range(threads)]
        self.answered = 0
        self.wrong: list[object] = []
        self.errors: list[MillstreamError] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new calls; returns when those under way have ended."""
        self._over.set()
        for thread in self._threads:
            thread.join(LONG_S)

    @property
    def size(self) -> int:
        """How many calls are under way at once."""
        return len(self._threads)

    def go_on(self, calls: int = 50, within_s: float = 30.0) -> None:
        """Until so many more calls were answered."""
        wanted = self.answered + calls
        eventually(lambda: self.answered >= wanted, within_s=within_s)

    def _call_on(self, lane: int) -> None:
        number = 0
        while not self._over.is_set():
            text = f"lane {lane} call {number}"
            number += 1
            try:
                result = self._client.submit(SERVICE, [text]).result()
            except MillstreamError as error:
                self.errors.append(error)
                continue
            with self._lock:
                self.answered += 1
            if result != [text]:
                self.wrong.append((text, result))


@dataclass(frozen=True)
class Mill:
    """`connection`, `queue` and `watch` are the test's own way to the server; `spec` is registered."""

    server: EmbeddedServer
    connection: Connection
    spec: ServiceSpec
    supervisor: Supervisor
    client: Client
    queue: Queue
    watch: Watch

    def cut(self) -> int:
        """End every connection but the test's own; how many."""
        return int(self.connection.client.client_kill_filter(_type="normal"))

    def demote(self) -> None:
        """Make the server a replica, of a primary that does not answer."""
        self.connection.client.replicaof("127.0.0.1", 1)

    def promote(self) -> None:
        self.connection.client.replicaof("NO", "ONE")

    def push(self) -> None:
        """Register the service again."""
        Registry(self.connection).push([self.spec])

    @contextmanager
    def calling(self, threads: int = THREADS) -> Iterator[Callers]:
        """Callers at work, answered before and after whatever happens to them."""
        callers = Callers(self.client, threads)
        callers.start()
        try:
            callers.go_on()
            yield callers
            callers.go_on()
        finally:
            callers.stop()

    @contextmanager
    def called(self, threads: int = THREADS) -> Iterator[Callers]:
        """The same where no call may fail."""
        with self.calling(threads) as callers:
            yield callers
        assert callers.errors == []
        assert callers.wrong == []

    def counted(self, field: str) -> int:
        """One counter of the workers that live, summed."""
        return sum(self.watch.counted(field).values())

    def most_attempts_until(self, callers: Callers, calls: int) -> float:
        """The most attempts that any job in hand has behind it, from now until so many more calls were answered."""
        wanted, attempts = callers.answered + calls, 0.0

        def answered() -> bool:
            nonlocal attempts
            attempts = max(attempts, self.watch.attempts())
            return callers.answered >= wanted

        eventually(answered, within_s=30.0)
        return attempts

    def ran_once_each(self, calls: int) -> None:
        """So many calls of one row were all that ever ran, nothing is left of them, and no worker died of it."""
        eventually(lambda: not self.watch.depth())
        eventually(lambda: self.counted("rows") >= calls)
        self.beaten()
        assert self.counted("rows") == calls
        assert self.watch.held() == []
        assert self.supervisor.restarts == 0

    def beaten(self, beats: int = 2) -> None:
        """Until each worker has beaten so often from now on: what it counted before is published."""
        for consumer in self.watch.live():
            for _ in range(beats):
                self.beaten_by(consumer)

    def beaten_by(self, consumer: str) -> None:
        """Until this worker has beaten once more."""
        key = self.queue.keys.worker(consumer)
        before = self.connection.client.hget(key, "beat")
        eventually(lambda: self.connection.client.hget(key, "beat") != before, within_s=LONG_S)


@contextmanager
def milling(
    home: Path, binary: Path, *, workers: int = 1, forward_s: float = 0.0, tcp: bool = False, **runtime: object
) -> Iterator[Mill]:
    """A fresh server in `home`, with so many live workers of one echo service."""
    model = ModelSpec(type="echo", model_name=f"sleep:{forward_s}")
    spec = ServiceSpec(name=SERVICE, model=model, model_ref="m", runtime=Runtime.model_validate(runtime))
    with EmbeddedServer.start(home / "data", binary=binary, tcp_port=0 if tcp else None) as server:
        connection = Connection(server.url, name="tests")
        Registry(connection).push([spec])
        with _supervised(server.url, spec, workers) as supervisor, Client(server.url) as client:
            keys = ServiceKeys(SERVICE)
            watch = Watch(connection, keys)
            eventually(lambda: len(watch.live()) == workers, within_s=LONG_S)
            yield Mill(server, connection, spec, supervisor, client, Queue(connection.client, keys), watch)
        connection.close()


@contextmanager
def _supervised(url: str, spec: ServiceSpec, workers: int) -> Iterator[Supervisor]:
    supervisor = Supervisor(url, "ms", [Plan(spec, workers)], drain_s=10.0)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(LONG_S)


def let_pass(seconds: float) -> None:
    """The length of a fault: nothing is waited for."""
    threading.Event().wait(seconds)


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        # What a thread was just sending it sends before it stops.
        eventually(lambda: all(map(is_stopped, pids)))
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def unwritable(mill: Mill) -> Iterator[None]:
    """Its snapshots fail, as on a full disk: what would be their file is a folder."""
    client = mill.connection.client
    obstacle = mill.server.data_dir / "dump.rdb"
    obstacle.mkdir()
    (obstacle / "full").touch()
    client.config_set("save", "3600 1")
    client.bgsave()
    eventually(lambda: refuses_writes(client))
    yield
    (obstacle / "full").unlink()
    obstacle.rmdir()
    client.bgsave()
    eventually(lambda: not refuses_writes(client))


def refuses_writes(client: redis.Redis) -> bool:
    try:
        client.set("probe", 1)
    except redis.ResponseError as error:
        return "MISCONF" in str(error)
    return False
