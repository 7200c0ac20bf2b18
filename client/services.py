"""Services as this process knows them: specifications and live workers, read from Redis and reused for FRESH_S."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    InvalidRequest,
    MillstreamError,
    UnknownService,
)
from millstream.broker.contract.operations import RUNNABLE, Operation
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.pause import find_pause
from millstream.broker.queue.registry import Registered, Registry
from millstream.broker.queue.routes import Routes
from millstream.broker.transport.connection import Connection, translated
from millstream.client.asker import REFRESH_WAIT_S, Asker, Question
from millstream.client.known import FRESH_S, Known, KnownRoute
from millstream.client.version_choice import Caller, Chosen, choose_service, choose_shadow, choose_version


def operation_of(spec: ServiceSpec) -> Operation:
    """Returns the operation of this service's jobs.

    Raises InvalidRequest if this version has no worker for the service's type.
    """
    operation = spec.model.operation
    if not operation.loader:
        raise InvalidRequest(
            f"service {spec.name!r} is of type {spec.model.type!r}, which this version cannot call yet",
            hint=f"types that can be called: {', '.join(RUNNABLE)}",
        )
    return operation


class Services:
    """Reads the registry for a client. Thread-safe. While the server is unreachable, earlier answers are used."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._asker = Asker()
        self._known: dict[str, Known] = {}
        self._routes: dict[str, KnownRoute] = {}
        self._only: dict[str, tuple[str, float]] = {}

    def after_fork(self) -> None:
        """Gives a forked child its own thread."""
        self._asker.after_fork()

    def close(self) -> None:
        """Refuses new questions to the server."""
        self._asker.close()

    def known(self, service: str) -> ServiceSpec | None:
        """Returns the specification if it was read within FRESH_S, else None. Does not ask the server."""
        known = self._known.get(service)
        return known.spec if known and known.fresh else None

    def read(self, service: str, until: float | None = None) -> ServiceSpec:
        """Returns the specification of `service`, at most FRESH_S old if the server answers in time.

        Waits until `until`, monotonic seconds, at most; for a service that was read before at most REFRESH_WAIT_S.
        Raises UnknownService, BrokerUnavailable.
        """
        if spec := self.known(service):
            return spec
        question = self.ask(service)
        question.wait(until)
        return question.answer().spec

    def known_target(self, name: str) -> Known | KnownRoute | None:
        """Returns what calls to `name` go to, if it was read within FRESH_S, else None. Does not ask the server."""
        target = self._routes.get(name) or self._known.get(name)
        return target if target and target.fresh else None

    def ask_target(self, name: str) -> Question[Known | KnownRoute]:
        """Asks the server what calls to `name` go to: a service, or a route with its services."""
        return self._asker.ask(
            ("call", name), lambda: self._find_target(name), self._routes.get(name) or self._known.get(name)
        )

    def read_target(self, name: str, until: float | None = None) -> Known | KnownRoute:
        """Returns what calls to `name` go to. Waits and raises as `read` does."""
        if target := self.known_target(name):
            return target
        question = self.ask_target(name)
        question.wait(until)
        return question.answer()

    def choose(self, target: Known | KnownRoute, who: Caller) -> Chosen:
        """Returns the service that gets a call to `target`. Does not ask the server.

        Raises InvalidRequest if the call names a version that `target` does not have, and UnknownService.
        """
        if isinstance(target, Known):
            return choose_service(target.spec, who)
        route = target.route
        known = {version: self._known.get(service) for version, service in route.services.items()}
        ready = {version for version, each in known.items() if each and each.takes_jobs}
        version = choose_version(route, ready, who)
        chosen, fallback = known[version], known.get(route.fallback or "")
        if chosen is None:
            raise self._registry.unregistered(route, version)
        again = None
        if fallback and not who.version and version != route.fallback and route.crosses:
            again = Chosen(fallback.spec, route.fallback or "")
        return Chosen(chosen.spec, version, again, self._choose_shadow(route, ready, version, who))

    def _choose_shadow(self, route: RouteSpec, ready: Collection[str], version: str, who: Caller) -> Chosen | None:
        """Returns the version that gets a copy of the call; None for nearly all calls."""
        if not route.shadow or who.version:
            return None
        shadow = choose_shadow(route, ready, version, random.random())
        known = self._known.get(route.services[shadow]) if shadow else None
        return Chosen(known.spec, shadow) if known else None

    def ask(self, service: str) -> Question[Known]:
        """Asks the server about `service`. Calls that ask at the same time share the answer."""
        return self._asker.ask(service, lambda: self._read(service), self._known.get(service))

    def fingerprint(self, service: str) -> str:
        """Returns the fingerprint of the weights of `service` as last read.

        Returns "" if no worker has reported it, or the server could not be reached.
        """
        known = self._known.get(service)
        return known.fingerprint if known and not known.away else ""

    def known_only(self, model_type: str) -> str | None:
        """Returns what `only` found within FRESH_S, else None. Does not ask the server."""
        name, asked_at = self._only.get(model_type, (None, 0.0))
        return name if time.monotonic() - asked_at <= FRESH_S else None

    def only(self, model_type: str, until: float | None = None) -> str:
        """Returns the name of the only service of `model_type`. Waits as `read` does.

        Raises UnknownService if there is none or more than one, and BrokerUnavailable.
        """
        if name := self.known_only(model_type):
            return name
        question = self.ask_only(model_type)
        question.wait(until)
        return question.answer()

    def ask_only(self, model_type: str) -> Question[str]:
        """Asks the server which service is the only one of `model_type`."""
        before, _ = self._only.get(model_type, (None, 0.0))
        return self._asker.ask(("type", model_type), lambda: self._find_only(model_type), before)

    def live(self, service: str, changed: Callable[[], None]) -> int:
        """Returns the number of live workers as last read, at least 1. Does not wait for the server.

        If it was read more than FRESH_S ago, the server is asked again, and `changed` is called from another thread if
        the number differs.
        """
        known = self._known.get(service)
        live = max(1, known.live_workers) if known else 1
        if known is None or not known.fresh:

            def answered(future: Future[Known]) -> None:
                if future.exception() is None and max(1, future.result().live_workers) != live:
                    changed()

            self.ask(service).future.add_done_callback(answered)
        return live

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        """Calls `tell` with the present state of `service`, soon and from any thread.

        Calls it at once if the state was read within REFRESH_WAIT_S.
        """
        known = self._known.get(service)
        if known and time.monotonic() - known.read_at <= REFRESH_WAIT_S:
            tell(known)
            return

        def answered(future: Future[Known]) -> None:
            error, known = future.exception(), self.last_known(service)
            tell(replace(known, away=error) if isinstance(error, MillstreamError) else known)

        self.ask(service).future.add_done_callback(answered)

    def last_known(self, service: str) -> Known:
        """Returns the last description of a service that was read; `away` is set if it is older than REFRESH_WAIT_S."""
        known = self._known[service]
        if time.monotonic() - known.read_at <= REFRESH_WAIT_S:
            return known
        silent = BrokerUnavailable(
            f"Redis at {self._connection.safe_url} did not answer in time", hint="it is overloaded, frozen or cut off"
        )
        return known if known.away else replace(known, away=silent)

    def live_workers(self, service: str) -> int:
        """Asks the server for the number of live workers: those whose last heartbeat is younger than a lease.

        Raises UnknownService, BrokerUnavailable.
        """
        known = self.ask(service).future.result()
        if known.away:
            raise known.away
        return known.live_workers

    def _find_only(self, model_type: str) -> str:
        # A name may be left without its record, as by hand: it is no service.
        found = ((name, self._fresh(name)) for name in self._registry.names())
        names = [name for name, known in found if known and known.spec.model.type == model_type]
        if len(names) > 1 or any("@" in name for name in names):
            names = self._replace_versions(names)
        if len(names) == 1:
            self._only[model_type] = (names[0], time.monotonic())
            return names[0]
        if names:
            raise UnknownService(
                f"{len(names)} {model_type} services", hint=f"pass service=, one of {', '.join(names)}"
            )
        raise UnknownService(
            f"no {model_type} service on {self._connection.safe_url}",
            hint="run `millstream up` or `millstream config push`",
        )

    def _replace_versions(self, services: list[str]) -> list[str]:
        """Returns the names of which a caller chooses one: routes stand for the services of their versions."""
        routes = [route for name in self._route_names() if (route := self._registry.look_up(name)[1])]
        found = [route for route in routes if set(route.services.values()) <= set(services)]
        versions = {service for route in found for service in route.services.values()}
        return sorted({*(route.name for route in found), *(set(services) - versions)})

    def _route_names(self) -> list[str]:
        return Routes(self._connection, self._registry.prefix).names()

    def _find_target(self, name: str) -> Known | KnownRoute:
        """Reads `name` from the server, and the services of its versions if it is a route. In the asker's thread.

        Raises as `_read` does.
        """
        known = self._refresh(name)
        target = self._routes.get(name)
        if target is None:
            if known is None:
                raise self._registry.unknown(name)
            return known
        for service in target.route.services.values():
            if service != name:
                # A version that is not registered gets no calls.
                with suppress(UnknownService):
                    self._read(service)
        self._routes[name] = target = replace(target, read_at=time.monotonic())
        return target

    def _fresh(self, service: str) -> Known | None:
        known = self._known.get(service)
        return known if known and known.fresh else self._refresh(service)

    def _read(self, service: str) -> Known:
        """Reads `service` from the server, in the asker's thread.

        Raises UnknownService, and BrokerUnavailable if the service was never read.
        """
        known = self._refresh(service)
        if known is None:
            route = self._routes.get(service)
            raise self._registry.unknown(service, route.route if route else None)
        return known

    def _refresh(self, name: str) -> Known | None:
        """Reads the service and the route of this name, and notes both. Returns the service, None if there is none."""
        try:
            registered, route = self._registry.look_up(name)
            known = self._describe(name, registered) if registered else None
        except BrokerUnavailable as error:
            before = self._known.get(name)
            if before is None and name not in self._routes:
                raise
            known = before and replace(before, read_at=time.monotonic(), away=error.with_traceback(None))
        else:
            if route is None:
                self._routes.pop(name, None)
            else:
                standing = self._routes.get(name)
                self._routes[name] = replace(standing, route=route) if standing else KnownRoute(route)
        if known:
            self._known[name] = known
        else:
            self._known.pop(name, None)
        return known

    def _describe(self, name: str, registered: Registered) -> Known:
        spec, fingerprint, token = registered
        with translated(self._connection.safe_url):
            keys = self._registry.keys(name)
            live = Lease(self._connection.client, keys).live_workers()
            paused = find_pause(self._connection.client, keys) is not None
        known = Known(spec, fingerprint, live, paused, time.monotonic(), token=token)
        return replace(known, emptied_at=self._emptied_at(known))

    def _emptied_at(self, known: Known) -> float:
        """Returns when the server was last seen to have lost its data, monotonic seconds; 0 is never.

        A server that was emptied has another token.
        """
        before = self._known.get(known.name)
        if before is None:
            return 0.0
        return known.read_at if before.token and known.token != before.token else before.emptied_at
