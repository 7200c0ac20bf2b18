"""Services that commands call: found by name or as the only one of a type, with a live worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from millstream.broker.contract.errors import InvalidRequest, NoWorkers
from millstream.broker.contract.operations import Operation
from millstream.broker.queue.registry import Registry
from millstream.cli.server import connect
from millstream.client.known import Known
from millstream.client.services import Services
from millstream.client.version_choice import Caller

DEFAULT_WAIT_S = 1.0
"""Seconds to wait for a worker by default."""

_POLL_S = 0.1


def find_service(
    url: str,
    prefix: str,
    name: str | None,
    operation: Operation,
    fits: Callable[[Operation], bool],
    wait_s: float,
) -> str:
    """Returns the service or route to call, once it has a live worker. `name` None means the only one of `operation`.

    `fits` says if a service of this operation may be called. Raises UnknownService, InvalidRequest if the service does
    not fit, NoWorkers if no worker is alive within `wait_s` seconds, because one may just be starting.
    """
    with connect(url) as connection:
        services = Services(connection, Registry(connection, prefix))
        found = name or services.only(operation.type)
        target = services.read_target(found)
        kind = services.choose(target, Caller()).spec.model
        if not fits(kind.operation):
            raise InvalidRequest(f"service {found!r} is of type {kind.type!r}", hint=f"it cannot {operation.op}")
        names = [found] if isinstance(target, Known) else list(target.route.services.values())
        _await_worker(services, found, names, wait_s)
        return found


def _await_worker(services: Services, service: str, names: Sequence[str], wait_s: float) -> None:
    """Waits until a worker of one of the services `names` lives: of `service`, or of its versions if it is a route."""
    until = time.monotonic() + wait_s
    while not any(map(services.live_workers, names)):
        if time.monotonic() >= until:
            raise NoWorkers(
                f"no worker of service {service!r} is alive",
                hint="start one with `millstream up` or `millstream worker run`, or give --wait SECONDS",
            )
        time.sleep(_POLL_S)
