"""Thread: puts services back on a server that was emptied, from what it last read of them there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.errors import MillstreamError, described
from millstream.broker.queue.registry import Record, Registry, record_of
from millstream.broker.transport.connection import is_transient

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at the registry."""


class Registration:
    """One service's record as the server last had it. Changes that others push are taken over, never undone.

    It is written only if the server has none: after FLUSHALL, or if it came back without its data.
    """

    def __init__(self, registry: Registry, spec: ServiceSpec) -> None:
        self._registry = registry
        self._service = spec.name
        self._record: Record = record_of(spec)
        self._refused = ""

    def keep(self) -> bool:
        """Read the record, or put the last one back; whether it was put back. Raises what a read raises."""
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
                "service %s was registered no more, the server was emptied: it is registered again, "
                "and jobs that were accepted before are lost",
                self._service,
            )
        return restored

    def _log_refused(self, reason: str) -> None:
        if reason != self._refused:
            self._refused = reason
            log.error(
                "service %s is registered no more, and cannot be registered again from here: %s; run "
                "`millstream config push`",
                self._service,
                reason,
            )


class Registrar(threading.Thread):
    """Keeps the services of one supervisor registered until `stop`: none of its workers may be alive to do so."""

    def __init__(self, registry: Registry, specs: Sequence[ServiceSpec]) -> None:
        super().__init__(name="registrar", daemon=True)
        self._registrations = [Registration(registry, spec) for spec in specs]
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(LOOK_S)

    def look(self) -> None:
        """One look at each service. A server that is away is asked again at the next look."""
        for registration in self._registrations:
            try:
                registration.keep()
            except Exception as error:  # noqa: BLE001 - one service's broken keys must not end the care for all others
                log.debug("the registry cannot be read: %s", described(error))
