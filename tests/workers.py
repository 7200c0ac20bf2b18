"""Echo services with real worker processes, supervised by the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from support import eventually

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection
from millstream.worker.supervision.plan import Plan
from millstream.worker.supervision.supervisor import NO_VARIABLES, Supervisor

LONG_S = 60.0


def spec(name: str, *, forward_s: float = 0.0, **runtime: object) -> ServiceSpec:
    model = ModelSpec(type="echo", model_name=f"sleep:{forward_s}")
    return ServiceSpec(name=name, model=model, model_ref="m", runtime=Runtime.model_validate(runtime))


@contextmanager
def working(
    url: str,
    *specs: ServiceSpec,
    folder: Path | None = None,
    processes: int = 1,
    variables: Mapping[str, str] = NO_VARIABLES,
    prefix: str = "ms",
) -> Iterator[Supervisor]:
    """Worker `processes` for each of `specs`, which are registered, ready and drained in the end.

    `folder` holds the code of those that are custom. `variables` are those of the worker processes.
    """
    connection = Connection(url, name="tests")
    Registry(connection, prefix).push(specs)
    connection.close()
    plans = [Plan(each, processes, folder=str(folder or "")) for each in specs]
    supervisor = Supervisor(url, prefix, plans, drain_s=10.0, variables=variables)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        eventually(lambda: supervisor.ready == processes * len(specs), within_s=LONG_S)
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(LONG_S)


def remove(url: str, service: str) -> None:
    """Leave nothing of `service` on the server."""
    connection = Connection(url, name="tests")
    connection.client.unlink(*connection.client.scan_iter(f"ms:{{{service}}}:*", count=1000))
    connection.client.srem("ms:services", service)
    connection.close()
