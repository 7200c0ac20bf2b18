"""Checks the routes of a configuration: their versions, weights and fallbacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from millstream.broker.config.route import Route, weights_problem
from millstream.broker.config.yaml import KeyPath
from millstream.broker.contract.errors import did_you_mean
from millstream.broker.contract.operations import Operation

Found = Iterable[tuple[KeyPath, str]]


def check_routes(routes: Mapping[str, Route], services: Mapping[str, Operation | None]) -> Found:
    """Yields the place and the reason of each mistake in `routes`.

    `services` are those that have a model; None if the model is unknown, which is reported elsewhere.
    """
    for name, route in routes.items():
        path: KeyPath = ("services", name, "route")
        yield from _versions(path, name, route, services)
        yield from _fallback(path, name, route, services)
        yield from _canary(path, route)


def _versions(path: KeyPath, name: str, route: Route, services: Mapping[str, Operation | None]) -> Found:
    if reason := weights_problem({version: each.weight for version, each in route.versions.items()}):
        yield (*path, "versions"), f"{reason}, as in {{v1: 90, v2: 10}}"
    types: dict[str, str] = {}
    for version in route.versions:
        service = route.service_of(name, version)
        if service not in services:
            close = did_you_mean(service, services)
            fix = f"did you mean {close}?" if close else f"known are: {', '.join(services) or 'none'}"
            yield (*path, "versions", version), f"no service named {service}; {fix}"
        elif operation := services[service]:
            first = types.setdefault("first", operation.type)
            if operation.type != first:
                yield (*path, "versions", version), f"{service} is of type {operation.type}, the others of {first}"


def _canary(path: KeyPath, route: Route) -> Found:
    known = ", ".join(route.versions)
    if route.canary and route.canary.to not in route.versions:
        yield (*path, "canary", "to"), f"no version named {route.canary.to}; known are: {known}"
    for version in route.shadow:
        if version not in route.versions:
            yield (*path, "shadow", version), f"no version named {version}; known are: {known}"
    if sum(route.shadow.values()) > 1:
        yield (*path, "shadow"), "the shares are more than 1 together"


def _fallback(path: KeyPath, name: str, route: Route, services: Mapping[str, Operation | None]) -> Found:
    if route.fallback is None:
        return
    if route.fallback not in route.versions:
        yield (*path, "fallback"), f"no version named {route.fallback}; known are: {', '.join(route.versions)}"
        return
    operation = services.get(route.service_of(name, route.fallback))
    if operation and operation.results == "vectors" and not route.fallback_across_versions:
        reason = "vectors of two versions must not be compared; leave it out, or set fallback_across_versions: true"
        yield (*path, "fallback"), reason
