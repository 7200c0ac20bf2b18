"""The orders of operators that concern the workers of one process: read from the server, kept while it is away."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Mapping, Sequence

from millstream.broker.contract.errors import described
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.drains import Drains, Order, find_order, is_on
from millstream.broker.transport.connection import Connection

log = logging.getLogger(__name__)


class Orders:
    """Orders for workers of `services` on this host. One thread reads them, any thread may ask."""

    def __init__(self, connection: Connection, prefix: str, services: Collection[str]) -> None:
        self._drains = {name: Drains(connection.client, ServiceKeys(name, prefix)) for name in services}
        self._orders: Mapping[str, Mapping[str, Order]] = {}
        self.host = socket.gethostname()

    def read(self) -> None:
        """Reads the orders, and keeps those for this host. If the server is away, the last ones stay."""
        try:
            self._orders = {name: drains.read() for name, drains in self._drains.items()}
            for service, orders in self._orders.items():
                if any(is_on(self.host, name) for name in orders):
                    self._drains[service].keep()
        except Exception as error:  # noqa: BLE001 - without orders workers must go on
            log.debug("the orders cannot be read: %s", described(error))

    def find(self, services: Sequence[str], consumer: str) -> Order | None:
        """Returns the order for a worker, or for the next one in its place after it ended; None if there is none.

        A worker of several services ends if one of them orders it.
        """
        names = [self.host, consumer]
        found = {find_order(self._orders.get(service, {}), names) for service in services}
        return "stop" if "stop" in found else "drain" if "drain" in found else None
