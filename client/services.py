"""What this process knows of the services: their specifications and live workers, read from Redis and kept a moment."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from millstream.broker.config import ServiceSpec
from millstream.broker.connection import Connection, translated
from millstream.broker.errors import BrokerUnavailable, InvalidRequest, UnknownService
from millstream.broker.lease import Lease
from millstream.broker.pause import find_pause
from millstream.broker.registry import Registry

FRESH_S = 1.0
_OPS = {"embedding": "embed", "reranker": "rerank", "custom": "call", "echo": "echo"}


@dataclass(frozen=True, slots=True)
class _Known:
    """One service, as the server described it at `read_at`, monotonic seconds."""

    spec: ServiceSpec
    fingerprint: str
    live_workers: int
    paused: bool
    read_at: float
    away: BrokerUnavailable | None = None
    """Why the server could not be asked, where this is what it said before."""


def op_of(spec: ServiceSpec) -> str:
    """The operation that jobs of this service name. Raises InvalidRequest where this version has none for its type."""
    op = _OPS.get(spec.model.type)
    if op is None:
        raise InvalidRequest(
            f"service {spec.name!r} is of type {spec.model.type!r}, which this version cannot call yet",
            hint="embedding, reranker and custom services can be called",
        )
    return op


class Services:
    """The registry as a client sees it; thread-safe. What was read stays good while the server is away."""

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self._lock = threading.RLock()
        self._known: dict[str, _Known] = {}
        self._only: dict[str, tuple[str, float]] = {}

    def read(self, service: str) -> tuple[ServiceSpec, int]:
        """The specification of `service`, and how many of its workers live; both at most FRESH_S old.

        Raises UnknownService, BrokerUnavailable.
        """
        if known := self.known(service):
            return known
        read = self._read_since(service, time.monotonic() - FRESH_S)
        return read.spec, read.live_workers

    def known(self, service: str) -> tuple[ServiceSpec, int] | None:
        """What `read` would answer without asking the server."""
        known = self._known.get(service)
        return (known.spec, known.live_workers) if known and time.monotonic() - known.read_at <= FRESH_S else None

    def fingerprint(self, service: str) -> str:
        """The weights of `service` as last read; "" where no worker has said them, or the server is away."""
        known = self._known.get(service)
        return known.fingerprint if known and not known.away else ""

    def after_fork(self) -> None:
        """In a forked child: the lock may have been held in the parent."""
        self._lock = threading.RLock()

    def remembered(self, model_type: str) -> str | None:
        """What `only` answered a moment ago."""
        name, asked_at = self._only.get(model_type, (None, 0.0))
        return name if time.monotonic() - asked_at <= FRESH_S else None

    def only(self, model_type: str) -> str:
        """The one service of `model_type`. Raises UnknownService where there is none, or more than one to list."""
        # Under the lock: of a thousand threads that ask at once, one asks the server.
        with self._lock:
            if name := self.remembered(model_type):
                return name
            try:
                name = self._find_only(model_type)
            except BrokerUnavailable:
                if model_type not in self._only:
                    raise
                name, _ = self._only[model_type]
            self._only[model_type] = (name, time.monotonic())
            return name

    def live_workers(self, service: str) -> int:
        """Workers with a beat younger than a lease, asked now. Raises UnknownService, BrokerUnavailable."""
        known = self._read_since(service, time.monotonic())
        if known.away:
            raise known.away
        return known.live_workers

    def paused(self, service: str) -> bool:
        """Whether the service was paused when the server was last asked."""
        known = self._known.get(service)
        return known is not None and known.paused

    def _find_only(self, model_type: str) -> str:
        names = [name for name in self._registry.names() if self.read(name)[0].model.type == model_type]
        if len(names) == 1:
            return names[0]
        if names:
            raise UnknownService(f"{len(names)} {model_type} services", hint=f"say service=, one of {', '.join(names)}")
        raise UnknownService(
            f"no {model_type} service on {self._connection.safe_url}",
            hint="run `millstream up` or `millstream config push`",
        )

    def _read_since(self, service: str, since: float) -> _Known:
        """What the server said after `since`. Threads that ask at the same time share its answer."""
        with self._lock:
            known = self._known.get(service)
            if known is None or known.read_at < since:
                known = self._known[service] = self._ask(service, known)
            return known

    def _ask(self, service: str, before: _Known | None) -> _Known:
        try:
            spec, fingerprint = self._registry.describe(service)
            with translated(self._connection.safe_url):
                keys = self._registry.keys(service)
                live = Lease(self._connection.client, keys).live_workers()
                paused = find_pause(self._connection.client, keys) is not None
        except BrokerUnavailable as error:
            if before is None:
                raise
            return replace(before, read_at=time.monotonic(), away=error)
        return _Known(spec, fingerprint, live, paused, time.monotonic())
