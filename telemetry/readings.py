"""Readings of all services, which metrics and backlogs are made of."""

from __future__ import annotations

from collections.abc import Callable

from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.broker.transport.connection import Connection
from millstream.telemetry.metrics import Reading


def reader(connection: Connection, prefix: str = DEFAULT_PREFIX) -> Callable[[], list[Reading]]:
    """Returns a function that reads all registered services. It raises BrokerUnavailable and other errors of ours."""
    inspector, metrics = Inspector(connection, prefix), Metrics(connection, prefix)

    def read() -> list[Reading]:
        views = inspector.services()
        totals = metrics.services([view.name for view in views])
        return [Reading(*each) for each in zip(views, totals, strict=True)]

    return read
