"""Routes on the server: read, registered, changed while calls go on. Clients read them with the service's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from redis import WatchError

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import UnknownService, did_you_mean
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys, routes_key
from millstream.broker.queue.registry import ROUTE
from millstream.broker.transport.cluster import owner
from millstream.broker.transport.connection import Connection, translated

PINNED_MS = 7 * 86_400_000
"""Lifetime of the note which version a detached call with an idempotency key went to, ms."""


class Routes:
    """The routes of one server under one key prefix."""

    def __init__(self, connection: Connection, prefix: str = DEFAULT_PREFIX) -> None:
        self._connection = connection
        self._prefix = prefix

    def names(self) -> list[str]:
        """Returns the names of the routes, sorted. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            members = self._connection.client.smembers(routes_key(self._prefix))
        return sorted(name.decode() if isinstance(name, bytes) else name for name in members)

    def find(self, name: str) -> RouteSpec | None:
        """Returns the route of this name; None if there is none. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            stored = self._connection.client.hget(self._key(name), ROUTE)
        return RouteSpec.from_json(stored) if stored else None

    def read(self, name: str) -> RouteSpec:
        """Returns the route of this name. Raises UnknownService with the most similar one, BrokerUnavailable."""
        if route := self.find(name):
            return route
        names = self.names()
        near = did_you_mean(name, names)
        hint = f"did you mean {near}?" if near else f"routes here: {', '.join(names) or 'none'}"
        raise UnknownService(
            f"{name!r} is no route on {self._connection.safe_url}",
            did_you_mean=near,
            hint=hint,
        )

    def push(self, routes: Iterable[RouteSpec], replace: bool = False) -> tuple[list[str], list[str]]:
        """Registers `routes`. Returns the names of those that were written, and of those that differ and were kept.

        A route that is registered is kept as it is unless `replace`: its weights may have been changed since.
        """
        changed, standing_names = [], []
        for route in routes:
            standing = self.find(route.name)
            if standing and standing.model_copy(update={"previous": None}) == route:
                continue
            if standing and not replace:
                standing_names.append(route.name)
                continue
            self._write(route.name, partial(_replace, route))
            changed.append(route.name)
        return changed, standing_names

    def change(self, name: str, change: Callable[[RouteSpec], RouteSpec]) -> RouteSpec:
        """Writes what `change` makes of the route, and returns it. Raises UnknownService, and what `change` raises."""
        first = self.read(name)
        return self._write(name, lambda standing: change(standing or first))

    def pin(self, name: str, call: str, version: str) -> str:
        """Returns the version that a detached call went to first: `version` if no client has sent it yet."""
        key = ServiceKeys(name, self._prefix).pinned(call)
        with translated(self._connection.safe_url):
            self._connection.client.set(key, version, nx=True, px=PINNED_MS)
            stored = self._connection.client.get(key)
        return stored.decode() if isinstance(stored, bytes) else version

    def _write(self, name: str, change: Callable[[RouteSpec | None], RouteSpec]) -> RouteSpec:
        key = self._key(name)
        with translated(self._connection.safe_url):
            self._connection.client.sadd(routes_key(self._prefix), name)
            while True:
                with owner(self._connection.client, key).pipeline() as pipe:
                    # WATCH: of two changes at the same time, the second is made of the first one's result.
                    pipe.watch(key)  # type: ignore[no-untyped-call]
                    stored = pipe.hget(key, ROUTE)
                    route = change(RouteSpec.from_json(cast(bytes, stored)) if stored else None)
                    pipe.multi()
                    pipe.hset(key, ROUTE, route.to_json())
                    try:
                        pipe.execute()
                    except WatchError:
                        continue
                    return route

    def _key(self, name: str) -> str:
        return ServiceKeys(name, self._prefix).spec()


def _replace(route: RouteSpec, standing: RouteSpec | None) -> RouteSpec:
    return route
