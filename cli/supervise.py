"""Runs a supervisor in the foreground: shows its status, restarts its server after a crash, and ends cleanly."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping

from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.queue.inspector import Inspector, ServiceView
from millstream.broker.server.embedded import EmbeddedServer
from millstream.cli.interrupts import Interrupts
from millstream.cli.status import Status
from millstream.worker.supervision.supervisor import Supervisor

log = logging.getLogger(__name__)

TICK_S = 0.1
"""Seconds between two updates of the status line."""

CHECK_S = 1.0
"""Seconds between two checks of the server and its queues."""

_RATE_CHECKS = 6
"""Checks over which a rate is averaged."""

_LONGEST_PAUSE_S = 30.0
"""Longest pause between two restarts of the server, seconds."""


def supervise(
    supervisor: Supervisor,
    interrupts: Interrupts,
    status: Status,
    inspector: Inspector | None = None,
    server: EmbeddedServer | None = None,
    *,
    whole: bool = False,
) -> None:
    """Runs `supervisor` until it is interrupted and drained. If `server` crashes meanwhile, it is started again.

    Raises the errors of Supervisor.run, ModelUnavailable if `whole` and the workers of a service cannot start,
    KeyboardInterrupt if a second interrupt ended the drain.
    """
    monitor = Monitor(supervisor, interrupts, status, inspector, server, whole=whole)
    monitor.start()
    try:
        interrupts.attach(supervisor)
        supervisor.run()
    finally:
        monitor.end()
    if monitor.refusals:
        raise ModelUnavailable("; ".join(f"service {name}: a worker {how}" for name, how in monitor.refusals.items()))
    if interrupts.kills:
        raise KeyboardInterrupt


class Monitor(threading.Thread):
    """A thread that checks the processes ten times a second, and the server and its queues once a second."""

    def __init__(
        self,
        supervisor: Supervisor,
        interrupts: Interrupts,
        status: Status,
        inspector: Inspector | None,
        server: EmbeddedServer | None,
        *,
        whole: bool,
    ) -> None:
        super().__init__(name="monitor", daemon=True)
        self._supervisor = supervisor
        self._interrupts = interrupts
        self._status = status
        self._inspector = inspector
        self._server = server
        self._whole = whole
        self.refusals: Mapping[str, str] = {}
        self._ended = threading.Event()
        self._was_ready = False
        self._figures: Mapping[str, str] = {}
        self._rates: defaultdict[str, Rate] = defaultdict(Rate)
        self._pause_s = 0.0
        self._restart_at = 0.0

    def end(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        check_at = time.monotonic() + CHECK_S
        while not self._ended.wait(TICK_S):
            self._status.show(self._line())
            if self._whole and (refusals := self._supervisor.refusals()):
                self.refusals = refusals
                self._supervisor.stop()
            if time.monotonic() >= check_at:
                self._check()
                check_at = time.monotonic() + CHECK_S

    def _line(self) -> str:
        if self._interrupts.drains:
            return "draining: workers finish the jobs that they hold; interrupt again to kill"
        tally = self._supervisor.tally()
        counts = ", ".join(
            f"{name} {ready}/{planned}{self._figures.get(name, '')}" for name, (ready, planned) in tally.items()
        )
        drained = self._supervisor.drained
        return f"{self._phase()}: {counts}{f', {drained} drained' if drained else ''}"

    def _phase(self) -> str:
        # A worker that still drains is ready, too.
        if self._supervisor.ready + self._supervisor.drained >= self._supervisor.size:
            self._was_ready = True
            return "ready"
        return "degraded" if self._was_ready else "starting"

    def _check(self) -> None:
        try:
            if self._server:
                self._restart_if_gone(self._server)
            if self._inspector and self._status.detailed:
                self._figures = self._measure(self._inspector)
        except Exception as error:  # noqa: BLE001 - the status may fail, but the workers must go on
            log.debug("checking the server failed: %s", error)
            self._figures = dict.fromkeys(self._supervisor.tally(), " (the server does not answer)")

    def _restart_if_gone(self, server: EmbeddedServer) -> None:
        if server.alive() or time.monotonic() < self._restart_at:
            return
        log.warning("the server is gone; starting it again")
        try:
            server.restart()
        except MillstreamError as error:
            self._pause_s = min(_LONGEST_PAUSE_S, max(CHECK_S, 2 * self._pause_s))
            self._restart_at = time.monotonic() + self._pause_s
            log.warning("%s; next try in %g s", error, self._pause_s)
        else:
            self._pause_s = 0.0
            log.warning("the server is back, with its data")

    def _measure(self, inspector: Inspector) -> Mapping[str, str]:
        now = time.monotonic()
        views = inspector.services(list(self._supervisor.tally()))
        return {view.name: figures(view, self._rates[view.name].observe(view, now)) for view in views}


class Rate:
    """The rate of a service in rows a second, over the last _RATE_CHECKS checks."""

    def __init__(self) -> None:
        self._rows: Mapping[str, int] = {}
        self._total = 0
        self._checks: deque[tuple[float, int]] = deque(maxlen=_RATE_CHECKS)

    def observe(self, view: ServiceView, now: float) -> float:
        """Adds a check at `now` (monotonic seconds) and returns the rate."""
        # A consumer is one process, so its counter only grows. Its rows count from the check that first sees it.
        self._total += sum(worker.rows - self._rows.get(worker.consumer, worker.rows) for worker in view.workers)
        self._rows = {worker.consumer: worker.rows for worker in view.workers}
        self._checks.append((now, self._total))
        (since, before), (until, after) = self._checks[0], self._checks[-1]
        return (after - before) / (until - since) if until > since else 0.0


def figures(view: ServiceView, rate: float) -> str:
    """Returns the figures that follow a service's name and workers in the status line."""
    padding = f", padding {view.padding:.2f}" if view.padding else ""
    return f" ({view.depth} waiting, {view.in_flight} in flight, {rate:.0f} texts/s{padding})"
