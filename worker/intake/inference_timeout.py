"""Thread: ends jobs that are too long in the model. Their callers are told at once; the late result is dropped."""

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
"""How soon a limit that was pushed is felt where there was none."""

_MOST_LOOK_S, _LEAST_LOOK_S = 0.1, 0.005


class InferenceTimeout(threading.Thread):
    """Looks at the jobs in the model until `stop`. `limits` are the inference timeouts by priority, seconds.

    The forward goes on, since nothing can end it but the process's end; what it computes for an ended job is dropped.
    """

    def __init__(
        self, context: Context, limits: Mapping[Priority, float | None], finish: Callable[[Finished], None]
    ) -> None:
        super().__init__(name="timekeeper", daemon=True)
        self._window = context.window
        self._shutdown = context.shutdown
        self._limits = limits
        self._finish = finish
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        with self._shutdown.guard():
            while not self._stopped.wait(_look_s(self._limits)):
                self.look()

    def look(self) -> None:
        """End the jobs whose time is over now."""
        if not any(self._limits.values()):
            return
        now = time.monotonic()
        for job in self._window.end(self._window.overdue(self._limits, now)):
            self._finish(Finished(job.claim.address, Reply(error=_overdue(job, now))))


def _look_s(limits: Mapping[Priority, float | None]) -> float:
    """Often enough to be at most a tenth late."""
    shortest = min((limit for limit in limits.values() if limit), default=None)
    return IDLE_LOOK_S if shortest is None else min(_MOST_LOOK_S, max(_LEAST_LOOK_S, shortest / 10))


def _overdue(job: ActiveJob, now: float) -> DeadlineExceeded:
    message = f"not finished within its inference time: {job.in_model_s(now) * 1000:.0f} ms in the model"
    return DeadlineExceeded(message, phase="inference", hint="send fewer or shorter rows, or raise inference_timeout")
