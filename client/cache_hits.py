"""Adds the rows that a client found in the cache to the metrics of their services, once a second."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from contextlib import suppress

from millstream.broker.queue.metrics import add_cached
from millstream.broker.queue.registry import Registry
from millstream.broker.transport.connection import Connection

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Seconds between two additions. After as long without a hit the thread ends; the next hit starts another."""

WITHIN_S = 0.25
"""Seconds that the server has for an addition."""


class CacheHits:
    """Hits of one process that were not added yet, by service. Thread-safe.

    Hits are added at most once: if the answer to an addition is lost, its hits may be missing.
    """

    def __init__(self, connection: Connection, registry: Registry) -> None:
        self._connection = connection
        self._registry = registry
        self.after_fork()

    def after_fork(self) -> None:
        """Gives a forked child its own lock and thread. Its parent adds the hits before the fork."""
        self._lock = threading.Lock()
        self._rows: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, service: str, rows: int) -> None:
        """Notes that `rows` of a call were found in the cache. Waits for nothing."""
        if not rows:
            return
        with self._lock:
            self._rows[service] += rows
            if self._thread is None and not self._ended.is_set():
                thread = threading.Thread(target=self._run, name="millstream-cache-hits", daemon=True)
                # If no thread can be started, the next hit tries again, and `close` adds what is left.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def flush(self) -> None:
        """Adds all hits so far. Waits for the server for at most WITHIN_S a service, and drops them if it is away."""
        with self._lock:
            rows, self._rows = self._rows, Counter()
        for service, count in rows.items():
            try:
                add_cached(self._connection.within(WITHIN_S), self._registry.keys(service), count)
            except Exception as error:  # noqa: BLE001 - whatever it is: counting fails no call
                log.debug("%d cache hits of service %s are not counted: %s", count, service, error)

    def close(self) -> None:
        """Ends the thread, and adds what is left."""
        self._ended.set()
        self.flush()

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            with self._lock:
                if not self._rows:
                    self._thread = None
                    return
            self.flush()
