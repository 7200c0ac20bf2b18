"""One service of a pool: what is measured of its model, what waits for it, and its lane while the model is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from millstream.broker.config.spec import ServiceSpec
from millstream.broker.contract.job import PRIORITIES
from millstream.broker.queue.look import Look
from millstream.broker.transport.connection import Connection
from millstream.worker.lane import Lane
from millstream.worker.models.base import Model
from millstream.worker.scheduling.residence import Standing
from millstream.worker.scheduling.slack import NO_WORK_S, targets
from millstream.worker.shutdown import Shutdown

State = Literal["standby", "loading", "ready", "evicting", "failed"]

MINUTE_S = 60.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A loaded model and its lane. `shutdown` and `connection` are those of the lane alone."""

    model: Model
    lane: Lane
    shutdown: Shutdown
    connection: Connection


@dataclass(slots=True, eq=False)
class Member:
    """State of one service; only the pool's thread writes it.

    `held`, `loading`: bytes as in Standing. `load_s`: seconds of the last load. `job_s`: seconds of the device for a
    job. `retry_at`: monotonic seconds before which a failed load is not tried again. `why`: reason of the failure.
    """

    spec: ServiceSpec
    resident: Resident | None = None
    state: State = "standby"
    why: str = ""
    held: int = 0
    loading: int = 0
    load_s: float = 0.0
    job_s: float = 0.0
    since: float = 0.0
    loads: int = 0
    failures: int = 0
    retry_at: float = 0.0
    look: Look | None = None
    _loaded_at: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def standing(self, now: float) -> Standing:
        """Its place among the models of the pool at `now`, monotonic seconds."""
        slack_s, rank = self._held() if self.resident else self._waiting()
        order = self.spec.model.priority
        return Standing(
            resident=self.resident is not None,
            slack_s=slack_s,
            rank=rank,
            order=float("inf") if order is None else order,
            held=self.held,
            loading=self.loading,
            load_s=self.load_s,
            since=self.since,
            keep=self.spec.model.keep,
            blocked=now < self.retry_at,
        )

    def _held(self) -> tuple[float, int]:
        assert self.resident
        work = self.resident.lane.runner.work
        return (work.slack_s, work.rank) if work else (NO_WORK_S, 0)

    def _waiting(self) -> tuple[float, int]:
        """Slack and class of the jobs in the queue: the oldest of each class, and the last one behind all others."""
        look = self.look
        if look is None or look.paused:
            return NO_WORK_S, 0
        target, found = targets(self.spec.runtime.target), list[tuple[float, int]]()
        before_s = self.load_s
        for rank, priority in enumerate(PRIORITIES):
            jobs, at, deadline = look.streams[priority]
            if not jobs:
                continue
            due = (at or look.now) + 1000 * target[priority]
            left_s = (min(due, deadline or due) - look.now) / 1000
            found.append((left_s - before_s - self.job_s, rank))
            before_s += jobs * self.job_s
            # The last one came at most now, so it is due one target from now at most.
            found.append((target[priority] - before_s, rank))
        return (min(found)[0], min(rank for _, rank in found)) if found else (NO_WORK_S, 0)

    def note_loaded(self, seconds: float, now: float) -> None:
        """Notes that its model is in memory, after a load of `seconds`."""
        self.load_s, self.since = seconds, now
        self.loads += 1
        self._loaded_at.append(now)
        self.failures, self.why, self.retry_at = 0, "", 0.0
        self.state, self.look = "ready", None

    def note_left(self, job_s: float) -> None:
        """Notes that its model is not in memory any more. `job_s`: seconds of the device for a job, 0.0 if unknown."""
        self.resident, self.state, self.look = None, "standby", None
        self.job_s = job_s or self.job_s

    def note_failed(self, why: str, now: float) -> None:
        """Notes that a load failed. It is tried again later, each time later."""
        self.state, self.why = "failed", why
        self.retry_at = now + min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**self.failures)
        self.failures = min(self.failures + 1, 10)

    def figures(self) -> Mapping[str, str | int]:
        """Fields of its heartbeat that only a pool has."""
        now = time.monotonic()
        return {
            "resident": int(self.state == "ready"),
            "memory": self.held,
            "loads": self.loads,
            "loads_minute": sum(now - at <= MINUTE_S for at in list(self._loaded_at)),
        }
