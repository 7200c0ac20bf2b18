"""Views of routes and their versions, and checks, that the commands of `millstream route` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import InvalidRequest, NoWorkers
from millstream.broker.queue.canaries import CanaryView, read_samples
from millstream.broker.queue.canary_sample import Sample
from millstream.broker.queue.inspector import Inspector
from millstream.broker.queue.metrics import Metrics
from millstream.broker.queue.registry import Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import Connection
from millstream.cli.server import connect, find_server


class VersionView(NamedTuple):
    """A version of a route as it is seen now. The counts are totals of its service, see Metrics.

    `share` is the part of the calls by weight, 0 to 1; `jobs` are accepted ones; `ok` and `failed` are rows.
    """

    route: str
    version: str
    service: str
    weight: float
    share: float
    workers: int
    waiting: int
    jobs: int
    ok: int
    failed: int
    refused: int


class CanaryNow(NamedTuple):
    """A canary, and the totals now of its version and of those that it is compared with."""

    view: CanaryView
    samples: tuple[Sample, Sample]


@contextmanager
def open_routes(url: str | None, prefix: str | None) -> Iterator[tuple[Connection, Routes, str]]:
    """Yields a connection to the server, its routes and the key prefix."""
    target = find_server(url, prefix)
    with connect(target.url) as connection:
        yield connection, Routes(connection, target.prefix), target.prefix


def find_canary(connection: Connection, prefix: str, route: RouteSpec) -> CanaryNow | None:
    """Returns the canary of a route as it is now; None if it has none."""
    view = Routes(connection, prefix).canary(route)
    if view is None:
        return None
    samples = read_samples(Metrics(connection, prefix), route, view.state.plan.to, view.state.before)
    return CanaryNow(view, samples)


def check_services(registry: Registry, route: RouteSpec) -> None:
    """Raises UnknownService if the service of a version is not registered, InvalidRequest if types differ."""
    types = {service: registry.read(service).model.type for service in route.services.values()}
    if len(set(types.values())) > 1:
        named = ", ".join(f"{service} is {of}" for service, of in types.items())
        raise InvalidRequest(f"the versions of route {route.name!r} are of different types: {named}")


def check_workers(connection: Connection, prefix: str, route: RouteSpec) -> None:
    """Raises NoWorkers if no worker of a version with a weight is alive."""
    for view in find_versions(connection, prefix, route):
        if view.weight and not view.workers:
            raise NoWorkers(
                f"no worker of service {view.service!r}, version {view.version!r}, is alive",
                hint="start one first; --force changes the weights anyway",
            )


def find_versions(connection: Connection, prefix: str, route: RouteSpec) -> Iterator[VersionView]:
    """Yields the versions of a route as they are now."""
    names = list(route.services.values())
    views, totals = Inspector(connection, prefix).services(names), Metrics(connection, prefix).services(names)
    whole = sum(route.weights.values()) or 1.0
    for (version, service), view, total in zip(route.services.items(), views, totals, strict=True):
        weight = route.weights.get(version, 0.0)
        yield VersionView(
            route=route.name,
            version=version,
            service=service,
            weight=weight,
            share=weight / whole,
            workers=len(view.workers),
            waiting=sum(view.waiting.values()),
            jobs=sum(total.jobs.values()),
            ok=total.ok,
            failed=sum(total.failed.values()),
            refused=sum(total.refused.values()),
        )
