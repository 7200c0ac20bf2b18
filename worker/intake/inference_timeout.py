"""Thread that ends jobs that exceed their inference timeout. Callers get an error at once, late results are dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from millstream.broker.contract.errors import DeadlineExceeded
from millstream.broker.contract.job import Priority, Reply
from millstream.worker.context import Context
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import ActiveJob

IDLE_LOOK_S = 0.5
"""Seconds between two checks while no limit is set: a pushed limit applies at most this late."""

HUNG_STEP_S = 1.0
"""Seconds beyond its limit after which a text ends without its output: the running step hangs."""

_MOST_LOOK_S, _LEAST_LOOK_S = 0.1, 0.005


class InferenceTimeout(threading.Thread):
    """Checks the jobs in the model until `stop`. `limits`: inference timeout by priority, seconds, None for no limit.

    The forward goes on, since only the end of the process could stop it. Its results for ended jobs are dropped.
    `grace_s`: seconds beyond the limit. An engine with slots ends its rows itself between two steps, with the output
    that they have; so they end here only if a step hangs.
    """

    def __init__(
        self,
        context: Context,
        limits: Mapping[Priority, float | None],
        finish: Callable[[Finished], None],
        grace_s: float = 0.0,
    ) -> None:
        super().__init__(name="timekeeper", daemon=True)
        self._window = context.window
        self._shutdown = context.shutdown
        self._limits = limits
        self._finish = finish
        self._grace_s = grace_s
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        with self._shutdown.guard():
            while not self._stopped.wait(_look_s(self._limits)):
                self.look()

    def look(self) -> None:
        """Ends the jobs that exceed their inference timeout now."""
        if not any(self._limits.values()):
            return
        now = time.monotonic()
        for job in self._window.end(self._window.overdue(self._limits, now - self._grace_s)):
            self._finish(Finished(job.claim.address, Reply(error=_overdue(job, now)), run=job))


def _look_s(limits: Mapping[Priority, float | None]) -> float:
    """Seconds until the next check: a tenth of the shortest limit, within bounds."""
    shortest = min((limit for limit in limits.values() if limit), default=None)
    return IDLE_LOOK_S if shortest is None else min(_MOST_LOOK_S, max(_LEAST_LOOK_S, shortest / 10))


def _overdue(job: ActiveJob, now: float) -> DeadlineExceeded:
    message = f"not finished within its inference time: {job.in_model_s(now) * 1000:.0f} ms in the model"
    return DeadlineExceeded(message, phase="inference", hint="send fewer or shorter rows, or raise inference_timeout")
