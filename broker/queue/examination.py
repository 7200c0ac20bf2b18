"""Examines a server and its services once: figures, specifications and troubles, for `doctor` and the dashboard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import ConfigError, UnknownService
from millstream.broker.contract.keys import DEFAULT_PREFIX
from millstream.broker.queue.diagnosis import Finding, diagnose
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.route_diagnosis import diagnose_canary
from millstream.broker.queue.routes import Routes
from millstream.broker.queue.server_facts import ServerFacts, read_server_facts
from millstream.broker.queue.views import ServiceView
from millstream.broker.transport.connection import Connection


@dataclass(frozen=True, slots=True)
class Examination:
    """The state of a server. `specs` lacks the services whose registered record cannot be read."""

    views: Sequence[ServiceView]
    specs: Mapping[str, ServiceSpec]
    servers: Sequence[ServerFacts]
    findings: Sequence[Finding]

    def view(self, service: str) -> ServiceView | None:
        return next((view for view in self.views if view.name == service), None)

    def findings_of(self, service: str) -> Sequence[Finding]:
        return [finding for finding in self.findings if finding.service == service]


def examine(connection: Connection, prefix: str = DEFAULT_PREFIX, names: Sequence[str] = ()) -> Examination:
    """Examines the services `names`, by default all. Changes nothing.

    Raises UnknownService if one of `names` is not registered, BrokerUnavailable.
    """
    registry = Registry(connection, prefix)
    servers = read_server_facts(connection)
    specs: dict[str, ServiceSpec] = {}
    unreadable: dict[str, Finding] = {}
    for name in names or registry.names():
        try:
            specs[name] = registry.read(name)
        except UnknownService:
            if names:
                raise
            # Removed meanwhile, or a push has not written its record yet.
        except ConfigError as error:
            unreadable[name] = Finding("error", name, "unreadable_service", error.message, error.hint)
    views = Inspector(connection, prefix).services([*specs, *unreadable])
    pairs = [(specs[view.name], view) for view in views if view.name in specs]
    found: Sequence[Finding] = diagnose(pairs, servers) if pairs or not unreadable else []
    found = [*unreadable.values(), *found, *_examine_routes(Routes(connection, prefix), names)]
    return Examination(views, specs, servers, found)


def _examine_routes(routes: Routes, names: Sequence[str]) -> Iterator[Finding]:
    """Yields what is found of the routes that have one of the services `names`, or of all."""
    for route in routes.records():
        if not names or {*names} & {route.name, *route.services.values()}:
            canary = routes.canary(route)
            yield from diagnose_canary(route, canary) if canary else ()
