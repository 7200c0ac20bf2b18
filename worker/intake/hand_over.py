"""Thread that gives jobs back to the queue before they are complete, so that other workers go on with them.

It gives back rows that were displaced for too long, and all jobs of a worker that drains: at once if another worker is
ready, else when the time of the drain is nearly over. No job is charged an attempt. All output reaches the server
first, so that the next worker begins right behind it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.queue.lease import Lease
from millstream.broker.transport.connection import is_transient, retrying
from millstream.worker.context import Context
from millstream.worker.scheduling.active_job import ActiveJob

log = logging.getLogger(__name__)

LOOK_S = 0.15
"""Seconds between two looks for a ready worker during a drain. Workers that drain at the same time publish that before
the first look, and are not ready then."""

FLUSH_S = 2.0
"""Seconds that the output of a job may take to reach the server. Output that does not is generated again."""

SPARE_S = 2.0
"""Seconds before the end of a drain at which jobs are given back, at most half the drain. At the end the process is
killed."""


class Flushes(Protocol):
    """Emits the output of jobs."""

    def flush(self, names: Sequence[str], timeout: float) -> bool:
        """Waits until the server has all output of these jobs; False after `timeout` seconds."""
        ...

    def forget(self, names: Sequence[str]) -> None:
        """Emits no more of these jobs."""
        ...


class Others(NamedTuple):
    """The other workers of the service. `live`: any that beats; `ready`: any that claims. `announce`: publishes the
    state of this worker soon."""

    live: Callable[[], bool]
    ready: Callable[[], bool]
    announce: Callable[[], object]


class HandOver(threading.Thread):
    """Gives back the jobs that were `put`, until `finish`. `drain_s`: seconds that a drain of this process may take."""

    def __init__(self, context: Context, lease: Lease, emitter: Flushes, others: Others, drain_s: float) -> None:
        super().__init__(name="handover", daemon=True)
        self._consumer = context.consumer
        self._window = context.window
        self._shutdown = context.shutdown
        self._lease = lease
        self._emitter = emitter
        self._others = others
        self._drain_s = drain_s - min(SPARE_S, drain_s / 2)
        self._queue: queue.SimpleQueue[Sequence[ActiveJob] | None] = queue.SimpleQueue()
        self._drains = False
        self._drains_since: float | None = None
        self.is_due = False

    def has_others(self) -> bool:
        """Whether another worker lives."""
        return self._others.live()

    def note_drain(self) -> None:
        """Notes that the worker drains. Only the first call has an effect.

        A lane that is evicted runs its jobs itself: no swap of models interrupts them.
        """
        if not (self._drains or self._shutdown.evicting):
            self._drains = True
            self._queue.put(())

    def put(self, jobs: Sequence[ActiveJob]) -> None:
        """Gives these jobs back. They must have left the window and the engine."""
        self._queue.put(jobs)

    def finish(self) -> None:
        """Gives back the jobs that were put so far, then ends."""
        self._queue.put(None)

    def run(self) -> None:
        with self._shutdown.guard():
            while True:
                try:
                    jobs = self._queue.get(timeout=LOOK_S if self._drains else None)
                except queue.Empty:
                    jobs = ()
                if jobs is None:
                    return
                if jobs:
                    self._give_back([job.name for job in jobs])
                elif not self.is_due:
                    self._look()

    def _look(self) -> None:
        """Decides during a drain whether it is time to hand over."""
        now = time.monotonic()
        if self._drains_since is None:
            self._drains_since = now
            self._others.announce()
        elif now - self._drains_since >= self._drain_s or self._is_another_ready():
            self.is_due = True

    def _is_another_ready(self) -> bool:
        try:
            return self._others.ready()
        except Exception as error:
            if not is_transient(error):
                raise
            return False

    def _give_back(self, names: Sequence[str]) -> None:
        if not self._emitter.flush(names, FLUSH_S):
            log.debug("some output of %d jobs did not reach the server", len(names))
        self._emitter.forget(names)
        # Before the release: this worker may claim the jobs again.
        self._window.forget(names)
        retrying(lambda: self._release(names), until=None, stop=None)
        log.log(logging.INFO if self.is_due else logging.DEBUG, "%d running jobs were handed over", len(names))

    def _release(self, names: Sequence[str]) -> None:
        # The answer to an earlier try may be lost, and this worker may have claimed the jobs again since.
        again = set(self._window.names())
        self._lease.release(self._consumer, only=[name for name in names if name not in again])
