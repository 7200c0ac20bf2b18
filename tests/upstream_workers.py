"""Worker processes of a service whose model a server of its own runs, and what they say of themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from support import eventually
from workers import LONG_S, remove

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.keys import upstream_key
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.worker.scheduling.upstream_limit import Limit
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import Supervisor


@contextmanager
def working(url: str, spec: ServiceSpec, workers: int = 1) -> Iterator[Supervisor]:
    connection = Connection(url, name="tests")
    Registry(connection).push([spec])
    supervisor = Supervisor(url, "ms", [Plan(spec, workers)], drain_s=5.0)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        eventually(lambda: supervisor.ready == workers, within_s=LONG_S)
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(LONG_S)
        assert spec.model.url
        connection.client.unlink(upstream_key(spec.model.url))
        connection.close()
        remove(url, spec.name)


def states(url: str, service: str) -> list[str]:
    connection = Connection(url, name="tests")
    try:
        (view,) = [each for each in Inspector(connection, "ms").services() if each.name == service]
        return [worker.state for worker in view.workers]
    finally:
        connection.close()


def pids(url: str, service: str) -> list[int]:
    connection = Connection(url, name="tests")
    try:
        (view,) = [each for each in Inspector(connection, "ms").services() if each.name == service]
        return [worker.pid for worker in view.workers]
    finally:
        connection.close()


def state(url: str, upstream: str) -> Limit:
    """The limit of a server that its workers share."""
    connection = Connection(url, name="tests")
    try:
        value = connection.client.hget(upstream_key(upstream), "state")
        return Limit.read(value.decode() if isinstance(value, bytes) else "")
    finally:
        connection.close()
