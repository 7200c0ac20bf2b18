"""Changes of a route's weights, as pure functions: set, promote, roll back. They raise InvalidRequest."""

from __future__ import annotations

from collections.abc import Mapping

from millstream.broker.config.route import RouteSpec, weights_problem
from millstream.broker.contract.errors import InvalidRequest, did_you_mean


def set_weights(route: RouteSpec, weights: Mapping[str, float]) -> RouteSpec:
    """Returns the route with these weights. A new version `v3` is the service ROUTE@v3.

    Each version that has a weight must be named: otherwise a forgotten one would keep a part of the calls, or lose it.
    """
    standing = {version: weight for version, weight in route.weights.items() if weight}
    forgotten = [f"{version}={weight:g}" for version, weight in standing.items() if version not in weights]
    if forgotten:
        raise InvalidRequest(
            f"route {route.name!r} has other versions with a weight", hint=f"name them too: {' '.join(forgotten)}"
        )
    if reason := weights_problem(weights):
        raise InvalidRequest(reason)
    services = {**{version: f"{route.name}@{version}" for version in weights}, **route.services}
    all_weights = {**dict.fromkeys(services, 0.0), **weights}
    return route.model_copy(update={"services": services}).weighted(all_weights)


def promote(route: RouteSpec, version: str) -> RouteSpec:
    """Returns the route with all calls for `version`."""
    check_version(route, version)
    return route.weighted({each: 100.0 if each == version else 0.0 for each in route.services})


def roll_back(route: RouteSpec) -> RouteSpec:
    """Returns the route with the weights before its last change. Rolling back twice undoes the first."""
    if route.previous is None:
        raise InvalidRequest(
            f"route {route.name!r} has no earlier weights", hint="`millstream route set` gives it other ones"
        )
    return route.weighted({**dict.fromkeys(route.services, 0.0), **route.previous})


def check_version(route: RouteSpec, version: str) -> None:
    """Raises InvalidRequest if the route has no such version."""
    if version not in route.services:
        near = did_you_mean(version, route.services)
        hint = f"did you mean {near}?" if near else f"its versions are {', '.join(route.services)}"
        raise InvalidRequest(f"route {route.name!r} has no version {version!r}", hint=hint)
