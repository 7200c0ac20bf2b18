"""Decides before each step of an engine with slots which rows leave it before they are complete.

A row leaves if its job was ended, if its time is over, if a more urgent row needs its slot, or if the worker hands its
texts over. A row that was displaced waits here, and goes on when a slot is free. After AWAY_S another worker may have
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.generation import DEADLINE
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.worker.context import Context
from millstream.worker.engines.base import Engine
from millstream.worker.engines.running import Running
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import SUSPECT, ActiveJob, Outcome, Rows, priority_of
from millstream.worker.scheduling.displacement import Candidate, displaced
from millstream.worker.shutdown import Ended

AWAY_S = 2.0
"""Seconds that a displaced row waits before it is given back to the queue. An earlier move would often cost more than
the wait: another worker has to read the whole text again."""


class HandsOver(Protocol):
    """Gives jobs back to the queue, so that other workers go on with them."""

    @property
    def is_due(self) -> bool:
        """Whether all jobs are to be given back now, because the worker drains."""
        ...

    def note_drain(self) -> None:
        """Notes that the worker drains."""
        ...

    def has_others(self) -> bool:
        """Whether another worker could take a job."""
        ...

    def put(self, jobs: Sequence[ActiveJob]) -> None:
        """Gives these jobs back. They must have left the window."""
        ...


class KeepsAll:
    """Gives no job back: for a worker without a queue."""

    is_due = False

    def note_drain(self) -> None: ...

    def has_others(self) -> bool:
        return False

    def put(self, jobs: Sequence[ActiveJob]) -> None:
        raise NotImplementedError


class SlotKeeper:
    """The rows of one engine with slots; for the runner's thread. `limits`: inference timeout by priority, seconds."""

    def __init__(
        self,
        context: Context,
        engine: Engine,
        running: Running,
        finish: Callable[[Finished], None],
        limits: Mapping[Priority, float | None],
        hand_over: HandsOver | None = None,
    ) -> None:
        self._window = context.window
        self._clock = context.clock
        self._counters = context.counters
        self._engine = engine
        self._running = running
        self._finish = finish
        self._limits = limits
        self._hand_over = hand_over or KeepsAll()
        self._waiting: dict[str, ActiveJob] = {}

    def begin_step(self) -> list[str]:
        """Makes rows leave that have to. Returns the names of the jobs that ended."""
        before = self._running.rows
        ended = self._drop_ended()
        ended += self.conclude_late()
        if self._window.closed:
            self._hand_over.note_drain()
        if self._hand_over.is_due:
            self._give_back([*self._running.jobs, *self._window.waiting_jobs()])
        elif self._waiting:
            self._give_back_waiting()
        if self._running.rows is not before:
            self._note_running()
        if self._running.rows and self._window.waiting:
            self._displace()
        return ended

    def note_admitted(self, names: Sequence[str]) -> None:
        """Notes that these jobs wait no more."""
        for name in names:
            self._waiting.pop(name, None)

    def displace(self, rows: Rows) -> None:
        """Makes rows wait that have left the engine."""
        now = time.monotonic()
        jobs = {row.owner: job for row in rows if (job := self._running.jobs.get(row.owner))}
        for row in rows:
            # A suspect whose output the server has is none any more, and a share pays for one run.
            if row.urgency[0] != SUSPECT or self._window.is_proven(row.owner):
                row.urgency = (priority_of(row), *row.urgency[1:])
        self._running.remove(rows)
        for job in jobs.values():
            job.displaced += 1
            job.waits_since = now
        self._waiting |= jobs
        self._window.put_back(rows)

    def _note_running(self) -> None:
        self._window.complete([], [], self._running.rows)

    def _drop_ended(self) -> list[str]:
        """Aborts rows whose job was cancelled, ended by another thread, or taken over while they ran."""
        gone = [name for name, job in self._waiting.items() if not self._window.holds(job)]
        self.note_admitted(gone)
        found = self._window.jobs_of(self._running.rows)
        if None not in found:
            return gone
        ended = [row for row, job in zip(self._running.rows, found, strict=True) if job is None]
        self._engine.abort(ended)
        return [*gone, *self._running.remove(ended)]

    # -- time limits -------------------------------------------------------------------------------------------

    def conclude_late(self) -> list[str]:
        """Ends the texts whose time is over. Their callers get the text so far, with the finish reason DEADLINE."""
        now, since = self._clock.now(), time.monotonic()
        late = {name for name, job in self._running.jobs.items() if self._is_late(job, now, since)}
        waiting = self._window.begun() if self._window.waiting else {}
        away = [name for name, job in waiting.items() if self._is_late(job, now, since)]
        if not (late or away):
            return []
        rows = [row for row in self._running.rows if row.owner in late] + self._window.withdraw(away)
        outcomes = self._conclude(rows)
        ended = self._running.remove([row for row in rows if row.owner in late])
        self.note_admitted(away)
        self._counters.rows += len(rows)
        for job in self._window.complete(rows, outcomes, self._running.rows):
            job.ended_at = now
            self._finish(Finished(job.claim.address, job.reply(), digests=job.digests, run=job))
        return [*ended, *away]

    def _is_late(self, job: ActiveJob, now: int, since: float) -> bool:
        if job.request.deadline and now >= job.request.deadline:
            return True
        limit = self._limits.get(job.claim.address.priority)
        return limit is not None and job.in_model_s(since) > limit

    def _conclude(self, rows: Rows) -> Sequence[Outcome]:
        try:
            return self._engine.conclude(rows, DEADLINE)
        except Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - an engine's fault is the error of its rows, and ends no worker
            self._engine.abort(rows)
            failure = error if isinstance(error, MillstreamError) else ModelFailed(described(error))
            return [failure] * len(rows)

    # -- slots for more urgent rows ----------------------------------------------------------------------------

    def _displace(self) -> None:
        room = self._engine.room()
        assert room is not None, "an engine with slots has room for them"
        claimants = self._window.claimants(room)
        # No row is less urgent than the last class.
        if not claimants or min(claimants) >= len(PRIORITIES):
            return
        running = self._running
        proven, records = self._window.is_proven, running.records
        candidates = [
            Candidate(row, records.get(id(row), 0), running.jobs[row.owner].displaced > 0, proven(row.owner))
            for row in running.rows
        ]
        if rows := displaced(candidates, claimants):
            self._engine.abort(rows)
            self.displace(rows)
            self._note_running()

    # -- to other workers --------------------------------------------------------------------------------------

    def _give_back_waiting(self) -> None:
        now = time.monotonic()
        names = [name for name, job in self._waiting.items() if now - job.waits_since >= AWAY_S]
        if names and self._hand_over.has_others():
            self._give_back(names)

    def _give_back(self, names: Sequence[str]) -> None:
        jobs = self._window.end(names)
        self.note_admitted(names)
        gone = {job.name for job in jobs}
        rows = [row for row in self._running.rows if row.owner in gone]
        self._engine.abort(rows)
        self._running.remove(rows)
        if jobs:
            self._hand_over.put(jobs)
