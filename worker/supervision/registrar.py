"""Thread of a supervisor that tells the server of it, and registers its services again if the server was emptied."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import MillstreamError, described
from millstream.broker.queue.registry import Record, Registry, record_of
from millstream.broker.transport.connection import is_transient

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two checks of the registry."""


class Registration:
    """One service's record as last read from the server. Changes that others push are kept, never undone.

    The record is written only if the server has none: after FLUSHALL, or a restart without its data.
    """

    def __init__(self, registry: Registry, spec: ServiceSpec) -> None:
        self._registry = registry
        self._service = spec.name
        self._record: Record = record_of(spec)
        self._refused = ""

    def keep(self) -> bool:
        """Reads the record; if there is none, writes the last one and returns True. Raises as a read does."""
        if standing := self._registry.record(self._service):
            self._record = standing
            self._refused = ""
            return False
        return self._put_back()

    def _put_back(self) -> bool:
        try:
            restored = self._registry.restore(self._service, self._record)
        except MillstreamError as error:
            if is_transient(error):
                raise
            self._log_refused(str(error))
            return False
        if restored:
            log.warning(
                "service %s was no longer registered, the server was emptied: it is registered again, "
                "and jobs that were accepted before are lost",
                self._service,
            )
        return restored

    def _log_refused(self, reason: str) -> None:
        if reason != self._refused:
            self._refused = reason
            log.error(
                "service %s is no longer registered, and cannot be registered again from here: %s; run "
                "`millstream config push`",
                self._service,
                reason,
            )


class Registrar(threading.Thread):
    """Keeps the services of one supervisor registered until `stop`, even if none of its workers is alive.

    `publish` writes the supervisor's state; it is called as often.
    """

    def __init__(
        self, registry: Registry, specs: Sequence[ServiceSpec], publish: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(name="registrar", daemon=True)
        self._publish = publish
        self._registrations = [Registration(registry, spec) for spec in specs]
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(LOOK_S)

    def look(self) -> None:
        """Checks each service once. If the server is away, the next check tries again."""
        for registration in self._registrations:
            try:
                registration.keep()
            except Exception as error:  # noqa: BLE001 - one service's broken keys must not affect the others
                log.debug("the registry cannot be read: %s", described(error))
        try:
            self._publish()
        except Exception as error:  # noqa: BLE001 - only who looks misses it
            log.debug("the supervisor's state cannot be published: %s", described(error))
