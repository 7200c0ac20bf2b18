"""What this process knows of the services: their specifications and live workers, read from Redis and kept a moment."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from millstream.broker.config import ServiceSpec
from millstream.broker.connection import Connection, translated
from millstream.broker.errors import BrokerUnavailable, InvalidRequest, UnknownService
from millstream.broker.lease import Lease
from millstream.broker.registry import Registry

FRESH_S = 1.0
_OPS = {"embedding": "embed", "echo": "echo"}


@dataclass(frozen=True, slots=True)
class _Known:
    spec: ServiceSpec
    live_workers: int
    read_at: float


def op_of(spec: ServiceSpec) -> str:
    """The operation that jobs of this service name. Raises InvalidRequest where this version has none for its type."""
    op = _OPS.get(spec.model.type)
    if op is None:
        raise InvalidRequest(
            f"service {spec.name!r} is of type {spec.model.type!r}, which this version cannot call yet",
            hint="embedding services can be called",
        )
    return op


class Services:
    """The registry as a client sees it; thread-safe. What was read stays good while the server is away."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._only: dict[str, tuple[str, float]] = {}

    def read(self, service: str) -> tuple[ServiceSpec, int]:
        """The specification of `service`, and how many of its workers live; both at most FRESH_S old.

        Raises UnknownService, BrokerUnavailable.
        """
        known = self._known.get(service)
        if known is None or not self.fresh(service):
            known = self._refresh(service, known)
        return known.spec, known.live_workers

    def fresh(self, service: str) -> bool:
        """Whether `read` would answer without asking the server."""
        known = self._known.get(service)
        return known is not None and time.monotonic() - known.read_at <= FRESH_S

    def after_fork(self) -> None:
        """In a forked child: the lock may have been held in the parent."""
        self._lock = threading.Lock()

    def remembered(self, model_type: str) -> str | None:
        """What `only` answered a moment ago."""
        name, asked_at = self._only.get(model_type, (None, 0.0))
        return name if time.monotonic() - asked_at <= FRESH_S else None

    def only(self, model_type: str) -> str:
        """The one service of `model_type`. Raises UnknownService where there is none, or more than one to list."""
        if name := self.remembered(model_type):
            return name
        names = [name for name in self._registry.names() if self.read(name)[0].model.type == model_type]
        if len(names) == 1:
            self._only[model_type] = (names[0], time.monotonic())
            return names[0]
        if names:
            raise UnknownService(f"{len(names)} {model_type} services", hint=f"say service=, one of {', '.join(names)}")
        raise UnknownService(
            f"no {model_type} service on {self._connection.safe_url}",
            hint="run `millstream up` or `millstream config push`",
        )

    def live_workers(self, service: str) -> int:
        """Workers of `service` with a beat younger than a lease, asked now. Raises BrokerUnavailable."""
        with translated(self._connection.safe_url):
            return Lease(self._connection.client, self._registry.keys(service)).live_workers()

    def _refresh(self, service: str, stale: _Known | None) -> _Known:
        with self._lock:
            known = self._known.get(service)
            if known is not None and known is not stale:
                return known
            try:
                known = _Known(self._registry.read(service), self.live_workers(service), time.monotonic())
            except BrokerUnavailable:
                if stale is None:
                    raise
                known = _Known(stale.spec, stale.live_workers, time.monotonic())
            self._known[service] = known
            return known
