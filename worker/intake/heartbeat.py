"""Thread that reports once a second that this process lives, extends its lease, and reads which jobs it lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from millstream.broker.queue.lease import Beat, Lease
from millstream.broker.transport.connection import is_missing_group, is_transient
from millstream.worker.context import Context
from millstream.worker.scheduling.packages import Packages

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Seconds between two beats."""


class Watch(NamedTuple):
    """Callbacks of a beat: `status` returns the fields to publish, `on_beat` gets the server's answer.

    `on_emptied` is called if the server has lost the service's streams. `is_stuck` says whether a thread is stuck.
    """

    status: Callable[[], Mapping[str, str | int]]
    on_beat: Callable[[Beat], None]
    on_emptied: Callable[[], object]
    is_stuck: Callable[[], bool]


class Heartbeat(threading.Thread):
    """Beats every EVERY_S seconds until `stop`."""

    def __init__(self, context: Context, lease: Lease, watch: Watch) -> None:
        super().__init__(name="beat", daemon=True)
        self._consumer = context.consumer
        self._lease = lease
        self._watch = watch
        self._held_names = context.window.names
        self._packages = Packages(context.counts, context.number)
        self._shutdown = context.shutdown
        self._stopped = threading.Event()
        self._due = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self._due.set()

    def beat_soon(self) -> None:
        """Makes the thread beat now, to publish a changed state."""
        self._due.set()

    def run(self) -> None:
        with self._shutdown.guard():
            while True:
                self._due.wait(EVERY_S)
                self._due.clear()
                if self._stopped.is_set():
                    return
                self.beat()

    def beat(self) -> None:
        """One beat, and a reclaim pass if one is due. If the server is away, the next beat tries again.

        A process with a stuck thread does not beat, so that others get its jobs when its lease is over.
        """
        if self._watch.is_stuck():
            return
        try:
            beat = self._send()
            self._watch.on_beat(beat)
            if beat.reclaim_due and (returned := self._lease.reclaim()):
                log.warning("%d jobs of lost workers were given back to the queue", returned)
        except Exception as error:
            if not is_transient(error) and not is_missing_group(error):
                raise
            log.debug("beat: %s", error)
            if is_missing_group(error):
                self._repair()

    def flush(self) -> None:
        """Sends what was counted since the last beat, if the server is there. Call it after the thread has ended."""
        try:
            # Twice: what the last beat could not confirm, and what was counted since.
            for _ in range(2):
                if self._packages.next(time.monotonic()).number:
                    self._send()
        except Exception as error:
            if not is_transient(error) and not is_missing_group(error):
                raise
            log.debug("the last counts: %s", error)

    def _send(self) -> Beat:
        package = self._packages.next(time.monotonic())
        beat = self._lease.beat(self._consumer, self._watch.status(), self._held_names(), package)
        self._packages.confirm(package)
        return beat

    def _repair(self) -> None:
        """Registers the service again if needed. The claimer makes groups again, but not while the window is full."""
        try:
            self._watch.on_emptied()
        except Exception as error:
            if not is_transient(error):
                raise
            log.debug("beat: %s", error)
