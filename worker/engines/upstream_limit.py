"""Thread: keeps this worker's part of the requests that a server runs at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from millstream.broker.contract.errors import described
from millstream.broker.contract.slots import Demand, Slots
from millstream.worker.scheduling.upstream_limit import START, Limit, Signals, allowed, next_limit

log = logging.getLogger(__name__)

EVERY_S = 0.1
"""Seconds between two reports of this worker while it sends requests."""

LEAST_S = 0.01
"""Seconds between two reports at least."""

ALONE_AFTER = 20
"""Reports in a row, from the first one on, that fail before a worker shares its slots with no other."""

IDLE_S = 1.0
"""Seconds between two reports of a worker that has nothing to send. Shorter than a lease."""


class Shares(Protocol):
    """Slots that several workers share."""

    consumer: str

    def exchange(self, demand: Demand, version: int, state: str) -> Slots:
        """Reports this worker's demand. Writes `state`, if it is not empty and `version` is still the current one."""
        ...

    def leave(self) -> None:
        """Gives this worker's slots to the others."""
        ...


class OwnSlots:
    """The slots of a worker that shares them with no other."""

    consumer = "alone"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._version = 0
        self._state = ""

    def exchange(self, demand: Demand, version: int, state: str) -> Slots:
        if state and version == self._version:
            self._version, self._state = version + 1, state
        return Slots(round(self._clock() * 1000), self._version, self._state, {self.consumer: demand})

    def leave(self) -> None:
        pass


class LimitKeeper(threading.Thread):
    """Reports this worker's demand and the server's signals, and keeps `slots`, the requests that it may have running.

    `demand` is asked in this thread; `notify` is called when `slots` grew. If the slots cannot be shared for a while,
    the worker goes on with its last part.
    """

    def __init__(self, shares: Shares, demand: Callable[[], Demand], notify: Callable[[], None]) -> None:
        super().__init__(name="slots", daemon=True)
        self._shares = shares
        self._demand = demand
        self._notify = notify
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stopped = False
        self._signals = Signals()
        self._known = Slots(0, 0, "", {})
        self._failures = 0
        self._last_demand = Demand(0, 0)
        self._offset_s = 0.0
        self.slots = 1
        self.requests = START
        self.reports = 0
        """Number of reports so far."""

    # -- the engine's side -------------------------------------------------------------------------------------

    def note_begun(self) -> None:
        with self._lock:
            self._signals = self._signals._replace(begun=self._signals.begun + 1)

    def note_refused(self, began: float, retry_s: float) -> None:
        """Notes that the server refused a request that began at `began`, monotonic seconds."""
        with self._lock:
            old = self._signals
            began_at = round((began + self._offset_s) * 1000)
            self._signals = old._replace(
                refused=old.refused + 1,
                refused_at=max(old.refused_at, began_at),
                retry_ms=max(old.retry_ms, round(retry_s * 1000)),
            )
        self.report_soon()

    def note_queue(self) -> None:
        """Notes that requests wait inside the server."""
        with self._lock:
            self._signals = self._signals._replace(queues=True)

    def report_if_idle(self) -> None:
        """Reports at once if the last report said that there was nothing to send."""
        if not any(self._last_demand):
            self._changed.set()

    def report_soon(self) -> None:
        """Reports at once, since the demand changed."""
        self._changed.set()

    def stop(self) -> None:
        self._stopped = True
        self._changed.set()

    # -- the thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._stopped:
            try:
                self.report()
            except Exception as error:  # noqa: BLE001 - without the server of the queue, the last part stays valid
                self._go_on_alone(error)
            demand = self._demand()
            self._changed.wait(EVERY_S if demand.running or demand.waiting else IDLE_S)
            self._changed.clear()
            if not self._stopped:
                time.sleep(LEAST_S)
        try:
            self._shares.leave()
        except Exception as error:  # noqa: BLE001 - the lease ends by itself
            log.debug("slots: %s", described(error))

    def _go_on_alone(self, error: Exception) -> None:
        self._failures += 1
        if not self._known.now and self._failures == ALONE_AFTER:
            # It has no part yet, and may never get one: this user of the server may lack the rights.
            log.warning(
                "slots cannot be shared with other workers, this one begins with %d: %s", START, described(error)
            )
            self._shares, self._known = OwnSlots(), Slots(0, 0, "", {})
            self._changed.set()
        else:
            log.debug("slots: %s", described(error))

    def report(self) -> None:
        """Reports once. Raises what the shares raise."""
        known = self._known
        demand = self._last_demand = self._demand()
        with self._lock:
            signals = self._signals
        now = round((time.monotonic() + self._offset_s) * 1000)
        limit = Limit.read(known.state)
        workers = {**known.workers, self._shares.consumer: demand}
        # The first call only reads.
        changed = next_limit(limit, signals, workers, now) if known.now else limit
        state = changed.text() if changed != limit else ""
        slots = self._shares.exchange(demand, known.version, state)
        self._offset_s = slots.now / 1000 - time.monotonic()
        self._known = slots
        if known.now:
            self._forget(signals)
        if state and slots.state == state and changed.requests != limit.requests:
            log.debug("the server may run %d requests at once", changed.requests)
        limit = Limit.read(slots.state)
        before, self.requests = self.slots, limit.requests
        self.reports += 1
        self.slots = allowed(limit, self._shares.consumer, slots.workers, slots.now)
        if self.slots > before:
            self._notify()

    def _forget(self, reported: Signals) -> None:
        """Drops the signals that were reported. Those that another worker's change explains are dropped, too."""
        with self._lock:
            now = self._signals
            is_same = now.refused == reported.refused
            self._signals = Signals(
                begun=now.begun - reported.begun,
                refused=now.refused - reported.refused,
                refused_at=0 if is_same else now.refused_at,
                retry_ms=0 if is_same else now.retry_ms,
                queues=now.queues and not reported.queues,
            )
