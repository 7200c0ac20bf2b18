"""Routes on the server: read, registered, changed while calls go on. Clients read them with the service's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, cast

import redis
from redis import WatchError

from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import ConfigError, UnknownService, did_you_mean
from millstream.broker.contract.keys import DEFAULT_PREFIX, ServiceKeys, routes_key
from millstream.broker.queue.canaries import CanaryView, read_canary
from millstream.broker.queue.canary_state import CanaryState
from millstream.broker.queue.canary_weights import read_with_canary
from millstream.broker.queue.registry import ROUTE
from millstream.broker.transport.cluster import owner
from millstream.broker.transport.connection import Connection, translated

PINNED_MS = 7 * 86_400_000
"""Lifetime of the note which version a detached call with an idempotency key went to, ms."""


class _Change(NamedTuple):
    """Record of a route that is to be written, and the canary that begins with it."""

    route: RouteSpec
    canary: CanaryState | None = None


class Routes:
    """The routes of one server under one key prefix, with the weights in effect."""

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
            return self._read(self._connection.client, self._keys(name))

    def records(self) -> list[RouteSpec]:
        """Returns all routes that this user may read, as they are registered: without the weights of canaries.

        One round trip for any number of them, after their names. Raises BrokerUnavailable.
        """
        names = self.names()
        with translated(self._connection.safe_url):
            pipe = self._connection.client.pipeline(transaction=False)
            for name in names:
                pipe.hget(self._keys(name).spec(), ROUTE)
            found = cast(list[object], pipe.execute(raise_on_error=False)) if names else []
        return [route for text in found if isinstance(text, bytes) and (route := _readable(text))]

    def in_effect(self) -> list[RouteSpec]:
        """Returns all routes that this user may read, with the weights in effect. Raises BrokerUnavailable."""
        found = [self.find(each.name) if each.canary_run else each for each in self.records()]
        return [route for route in found if route]

    def canary(self, route: RouteSpec) -> CanaryView | None:
        """Returns the canary of the route; None if it has none. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            return read_canary(self._connection.client, self._keys(route.name), route)

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
            if standing and standing.model_copy(update={"previous": None, "canary_run": ""}) == route:
                continue
            if standing and not replace:
                standing_names.append(route.name)
                continue
            self._write(route.name, partial(_replace, route))
            changed.append(route.name)
        return changed, standing_names

    def change(self, name: str, change: Callable[[RouteSpec], RouteSpec]) -> RouteSpec:
        """Writes what `change` makes of the route, and returns it. Raises UnknownService, and what `change` raises.

        If the result has no `canary_run`, the route's canary ends.
        """
        first = self.read(name)
        return self._write(name, lambda standing: _Change(change(standing or first)))

    def start_canary(self, name: str, start: Callable[[RouteSpec], CanaryState]) -> CanaryState:
        """Starts the canary that `start` makes of the route, instead of any earlier one.

        Raises UnknownService, and what `start` raises.
        """
        first, begun = self.read(name), list[CanaryState]()

        def change(standing: RouteSpec | None) -> _Change:
            begun.append(start(standing or first))
            return _Change((standing or first).model_copy(update={"canary_run": begun[-1].run}), begun[-1])

        self._write(name, change)
        return begun[-1]

    def now(self, name: str) -> int:
        """Returns the time of the server that has the route, ms. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            seconds, micros = owner(self._connection.client, self._keys(name).canary()).time()
        return int(seconds) * 1000 + int(micros) // 1000

    def pin(self, name: str, call: str, version: str) -> str:
        """Returns the version that a detached call went to first: `version` if no client has sent it yet."""
        key = ServiceKeys(name, self._prefix).pinned(call)
        with translated(self._connection.safe_url):
            self._connection.client.set(key, version, nx=True, px=PINNED_MS)
            stored = self._connection.client.get(key)
        return stored.decode() if isinstance(stored, bytes) else version

    def _write(self, name: str, change: Callable[[RouteSpec | None], _Change]) -> RouteSpec:
        keys = self._keys(name)
        with translated(self._connection.safe_url):
            self._connection.client.sadd(routes_key(self._prefix), name)
            while True:
                with owner(self._connection.client, keys.spec()).pipeline() as pipe:
                    # WATCH: of two changes at the same time, the second is made of the first one's result.
                    pipe.watch(keys.spec(), keys.canary())  # type: ignore[no-untyped-call]
                    route, canary = change(self._read(pipe, keys))
                    pipe.multi()
                    pipe.hset(keys.spec(), ROUTE, route.to_json())
                    if canary or not route.canary_run:
                        pipe.delete(keys.canary())
                    if canary:
                        pipe.hset(keys.canary(), mapping={"run": canary.run, "state": canary.to_json()})
                    try:
                        pipe.execute()
                    except WatchError:
                        continue
                    return route

    def _read(self, client: redis.Redis, keys: ServiceKeys) -> RouteSpec | None:
        return read_with_canary(client, keys, cast(bytes | None, client.hget(keys.spec(), ROUTE)))

    def _keys(self, name: str) -> ServiceKeys:
        return ServiceKeys(name, self._prefix)


def _replace(route: RouteSpec, standing: RouteSpec | None) -> _Change:
    return _Change(route)


def _readable(text: bytes) -> RouteSpec | None:
    try:
        return RouteSpec.from_json(text)
    except ConfigError:
        return None
