"""Choice of a version: which service of a route gets a call. Pure but for the random caller of `choose_version`.

Weighted rendezvous hashing: each version gets a score from its weight and a hash of the caller, and the highest wins.
A caller keeps its version while the weights are the same. From 10 % to 25 %, 15 % of the callers move.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping
from typing import NamedTuple

from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, did_you_mean


class Caller(NamedTuple):
    """Caller of a route: its tenant, its own key, and the version that it asks for; "" for none."""

    tenant: str = ""
    key: str = ""
    version: str = ""


class Chosen(NamedTuple):
    """Service that gets a call. `version` is "" without a route; `fallback` repeats the call if it fails.

    `shadow` gets a copy of the call.
    """

    spec: ServiceSpec
    version: str = ""
    fallback: Chosen | None = None
    shadow: Chosen | None = None


def choose_service(spec: ServiceSpec, caller: Caller) -> Chosen:
    """Returns the service `spec`, which has no route. Raises InvalidRequest if the call asks for a version."""
    if caller.version:
        raise InvalidRequest(
            f"service {spec.name!r} has no version {caller.version!r}: it has no route",
            hint="leave version= out; `millstream route show` lists the routes",
        )
    return Chosen(spec)


def choose_version(route: RouteSpec, ready: Collection[str], caller: Caller) -> str:
    """Returns the version that gets a call. `ready` are the versions whose services run jobs.

    Versions that are not ready get no calls while another one is. If the route may not cross versions, a caller keeps
    its version even then. Raises InvalidRequest if the caller asks for a version that the route does not have.
    """
    if caller.version:
        return _pinned(route, caller.version)
    weights = {version: weight for version, weight in route.weights.items() if weight > 0}
    weights = weights or dict.fromkeys(route.services, 1.0)
    if route.crosses:
        able = {version: weight for version, weight in weights.items() if version in ready}
        if not able and route.fallback in ready:
            return str(route.fallback)
        weights = able or weights
    return rendezvous(weights, f"{route.name}\0{_identity(route, caller)}")


def choose_shadow(route: RouteSpec, ready: Collection[str], version: str, draw: float) -> str:
    """Returns the version that gets a copy of a call to `version`, "" for none. `draw` is random, 0 to 1.

    Versions that are not ready get none. A canary judges its versions by their calls, so there are none beside it.
    """
    if route.canary_run:
        return ""
    for shadow, share in route.shadow.items():
        if draw < share:
            return shadow if shadow != version and shadow in ready else ""
        draw -= share
    return ""


def rendezvous(weights: Mapping[str, float], identity: str) -> str:
    """Returns the version of `identity`, a share of all identities in proportion to the weights, all above 0."""
    return max(weights, key=lambda version: -weights[version] / math.log(_uniform(f"{identity}\0{version}")))


def _uniform(text: str) -> float:
    """Returns a number above 0 and below 1, equal for equal texts."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


def _identity(route: RouteSpec, caller: Caller) -> str:
    if route.sticky == "none":
        return secrets.token_hex(16)
    return caller.tenant if route.sticky == "tenant" else caller.key


def _pinned(route: RouteSpec, version: str) -> str:
    if version in route.services:
        return version
    near = did_you_mean(version, route.services)
    raise InvalidRequest(
        f"route {route.name!r} has no version {version!r}",
        hint=f"did you mean {near}?" if near else f"its versions are {', '.join(route.services)}",
    )
