"""Thread of a supervisor's process that drives the canaries of its services: judges, goes on, and rolls back."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import described
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.canaries import Canaries, read_samples
from millstream.broker.queue.canary_judge import advance
from millstream.broker.queue.canary_state import CanaryState
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import Connection

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at the canaries."""

END_S = 2.0
"""Seconds at most that the end of the process waits for the thread."""


class CanaryDriver(threading.Thread):
    """Drives the canaries of routes that have one of `services` as a version, until `stop`.

    Of several supervisors one drives a canary at a time: the one that holds its lease.
    """

    def __init__(self, connection: Connection, prefix: str, services: Collection[str]) -> None:
        super().__init__(name="canaries", daemon=True)
        self._prefix = prefix
        self._services = set(services)
        self._routes = Routes(connection, prefix)
        self._metrics = Metrics(connection, prefix)
        self._canaries = Canaries(connection.client, f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}")
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(LOOK_S)

    def look(self) -> None:
        """Looks at each canary once. If the server is away, the next look tries again."""
        try:
            for route in self._routes.records():
                if route.canary_run and self._services & {*route.services.values()}:
                    self._drive(route)
        except Exception as error:  # noqa: BLE001 - canaries wait, but the workers must go on
            log.debug("the canaries cannot be driven: %s", described(error))

    def _drive(self, route: RouteSpec) -> None:
        keys = ServiceKeys(route.name, self._prefix)
        turn = self._canaries.look(keys, route.canary_run)
        if turn.state is None or not turn.state.is_running:
            return
        state = advance(
            turn.state, *read_samples(self._metrics, route, turn.state.plan.to, turn.state.before), turn.now
        )
        if state is not turn.state and self._canaries.decide(keys, turn, state):
            _log(route, turn.state, state)


def _log(route: RouteSpec, before: CanaryState, state: CanaryState) -> None:
    to = f"route {route.name}: the canary of version {state.plan.to}"
    if state.status == "rolled_back":
        log.warning("%s is rolled back: %s", to, state.reason)
    elif state.status == "promoted":
        log.warning("%s is good: it gets all calls", to)
    elif state.step != before.step:
        log.warning("%s is good: it gets %g %% of the calls", to, state.plan.steps[state.step])


@contextmanager
def driving(url: str, prefix: str, services: Collection[str]) -> Iterator[None]:
    """Drives the canaries of `services` meanwhile."""
    connection = Connection(url, name="millstream-canaries")
    driver = CanaryDriver(connection, prefix, services)
    driver.start()
    try:
        yield
    finally:
        driver.stop()
        driver.join(END_S)
        connection.close()
