"""Counts of shadows that were compared, failed or dropped, and their agreement, added to the metrics once a second."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import numpy as np

from millstream.broker.contract.metrics import HISTOGRAMS, Histogram, ShadowEnd, fields_of
from millstream.broker.queue.metrics import add_counts
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection

log = logging.getLogger(__name__)

WITHIN_S = 0.5
"""Seconds that an addition waits for the server at most."""


class ShadowCounts:
    """Counts of one process that were not added yet, by service. Thread-safe.

    Counts are added at most once: if the answer to an addition is lost, its counts may be missing.
    """

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self.after_fork()

    def after_fork(self) -> None:
        """Gives a forked child its own counts."""
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}

    def end(self, service: str, how: ShadowEnd) -> None:
        """Notes how a shadow of `service` ended."""
        with self._lock:
            self._counts.setdefault(service, Counter())[f"shadow:{how}"] += 1

    def compare(self, service: str, agreement: float, ms: float) -> None:
        """Notes the agreement of a shadow with its call, and the time to its answer."""
        self.end(service, "compared")
        with self._lock:
            counts = self._counts[service]
            # A counter does not fall: below 0 nothing agrees.
            for name, value in (("shadow_agreement", max(0.0, agreement)), ("shadow_latency", ms)):
                counts.update(fields_of(name, Histogram.empty(HISTOGRAMS[name]).plus(np.array([value]))))

    def flush(self) -> None:
        """Adds all counts so far. Waits for the server for at most WITHIN_S a service, and drops them if it is away."""
        with self._lock:
            found, self._counts = self._counts, {}
        for service, counts in found.items():
            try:
                add_counts(self._connection.within(WITHIN_S), self._registry.keys(service), counts)
            except Exception as error:  # noqa: BLE001 - whatever it is: counting fails no call
                log.debug("shadows of service %s are not counted: %s", service, error)
