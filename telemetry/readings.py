"""Readings of all services, which metrics and backlogs are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import Connection
from millstream.telemetry.metrics import Reading


def reader(connection: Connection, prefix: str = DEFAULT_PREFIX) -> Callable[[], list[Reading]]:
    """Returns a function that reads all registered services. It raises BrokerUnavailable and other errors of ours."""
    inspector, metrics, routes = Inspector(connection, prefix), Metrics(connection, prefix), Routes(connection, prefix)

    def read() -> list[Reading]:
        views = inspector.services()
        totals = metrics.services([view.name for view in views])
        shares, canaries = _read_routes(routes)
        return [
            Reading(view, total, shares.get(view.name, {}), canaries.get(view.name, ""))
            for view, total in zip(views, totals, strict=True)
        ]

    return read


def _read_routes(routes: Routes) -> tuple[Mapping[str, Mapping[str, float]], Mapping[str, str]]:
    """Returns the parts of the calls by service and route, and the state of its last canary by service."""
    shares: defaultdict[str, dict[str, float]] = defaultdict(dict)
    canaries: dict[str, str] = {}
    for route in routes.in_effect():
        whole = sum(route.weights.values()) or 1.0
        for version, service in route.services.items():
            shares[service][route.name] = route.weights.get(version, 0.0) / whole
        if canary := routes.canary(route):
            canaries[route.services[canary.state.plan.to]] = canary.state.status
    return shares, canaries
