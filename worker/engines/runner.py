"""The main loop: takes rows, runs the engine step by step, returns outcomes. Owns the device, in the main thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.job import Reply
from millstream.broker.contract.partial import Record
from millstream.worker.context import Context
from millstream.worker.engines.base import Engine, Step
from millstream.worker.intake.intake import expired
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import ActiveJob, Rows, priority_of
from millstream.worker.shutdown import Ended
from millstream.worker.supervision.progress import Stage

Jobs = dict[str, ActiveJob]
"""Jobs by name."""


class Emits(Protocol):
    """Shows the output of jobs that run."""

    def put(self, job: ActiveJob, record: Record) -> None:
        """Adds output of a job."""
        ...

    def forget(self, names: Sequence[str]) -> None:
        """Emits no more of these jobs: they ended."""
        ...


class Runner:
    """Runs the window's rows until it is closed and none is left. An engine with records needs an `emitter`."""

    def __init__(
        self, context: Context, engine: Engine, finish: Callable[[Finished], None], emitter: Emits | None = None
    ) -> None:
        self._window = context.window
        self._clock = context.clock
        self._counters = context.counters
        self._engine = engine
        self._track = context.progress.runner
        self._stage = context.stage
        self._threads = context.threads
        self._finish = finish
        self._emitter = emitter
        self._rows: Rows = []
        self._proven: set[int] = set()
        self._jobs: Jobs = {}

    def run(self) -> None:
        engine = self._engine
        while True:
            batch = self._window.take(engine.room(), wait=not engine.busy)
            if not batch and self.drained:
                return
            self._advance(batch)

    def turn(self) -> bool:
        """Does one step of `run` without waiting, for a process with several lanes. Returns whether there was work.

        Until the next turn no time counts for rows that still run, and no death is charged to them: another lane may
        have the device.
        """
        batch = self._window.take(self._engine.room(), wait=False)
        if not batch and not self._engine.busy:
            return False
        with self._stage(self._window.has_suspect(row.owner for row in (*batch, *self._rows))):
            if self._rows:
                self._resume()
            self._advance(batch)
            if self._rows:
                self._pause()
        return True

    @property
    def urgency(self) -> int | None:
        """Position in PRIORITIES of the most urgent row that waits or runs; None if a turn would find no work."""
        waiting = self._window.urgency
        running = min(map(priority_of, self._rows), default=None)
        return min((each for each in (waiting, running) if each is not None), default=None)

    @property
    def drained(self) -> bool:
        """Whether the window is closed and no row waits or runs."""
        return self._window.closed and not self._window.waiting and not self._engine.busy

    def use_threads(self) -> None:
        """Uses this model's number of threads, after a forward of another lane's model."""
        self._threads.apply()

    def _pause(self) -> None:
        now = time.monotonic()
        for job in self._jobs.values():
            job.pause(now)
        self._track.stop()

    def _resume(self) -> None:
        now = time.monotonic()
        for job in self._jobs.values():
            job.running_since = now
        self._track.start(self._jobs, Stage.RUN)

    def _advance(self, batch: Rows) -> None:
        if self._rows:
            self._drop_ended()
        if batch:
            self._admit(batch)
        if self._engine.busy:
            self._step()
        else:
            self._track.stop()
            self._window.complete([], [])

    def _admit(self, batch: Rows) -> None:
        # Before the check of deadlines: this may take a while, and a job that expires meanwhile must not start.
        self._threads.adapt(idle=not self._window.waiting)
        rows, jobs = self._in_time(batch)
        now, start = self._clock.now(), time.monotonic()
        for job in jobs.values():
            job.started_at = job.started_at or now
            job.running_since = start
        self._rows = [*self._rows, *rows] if self._rows else rows
        self._jobs.update(jobs)
        if rows:
            self._counters.cuts[self._window.cut] += 1
            self._track.start(self._jobs, Stage.RUN)
            self._engine.admit(rows)

    def _in_time(self, batch: Rows) -> tuple[Rows, Jobs]:
        """Returns the rows that may still start, and their jobs. Jobs whose time is over are finished with an error.

        It is the last check before the model. Rows whose job was ended meanwhile are dropped.
        """
        now = self._clock.now()
        found = self._window.jobs_of(batch)
        jobs = {job.name: job for job in found if job}
        missed = [name for name, job in jobs.items() if _missed(job, now)]
        if not missed and None not in found:
            return batch, jobs
        for job in self._window.end(missed):
            self._finish(Finished(job.claim.address, Reply(error=expired(job.request, _missed(job, now), now))))
        in_time = {name: job for name, job in jobs.items() if name not in missed}
        return [row for row, job in zip(batch, found, strict=True) if job and job.name in in_time], in_time

    def _drop_ended(self) -> None:
        """Aborts rows whose job was cancelled, expired or taken over while they ran."""
        found = self._window.jobs_of(self._rows)
        if None not in found:
            return
        ended = [row for row, job in zip(self._rows, found, strict=True) if job is None]
        self._engine.abort(ended)
        self._remove(ended)
        self._track.start(self._jobs, Stage.RUN)

    def _step(self) -> None:
        start = time.monotonic()
        self._track.lap()
        step = self._run_step()
        self._account(step, time.monotonic() - start)
        for row, record in step.records:
            if self._emitter and (job := self._jobs.get(row.owner)):
                self._emitter.put(job, record)
                self._proven.add(id(row))
        if step.rows:
            self._remove(step.rows)
        if step.displaced:
            self._remove(step.displaced, waits=True)
            self._window.put_back(step.displaced)
        running, proven = len(self._rows), len(self._proven)
        for job in self._window.complete(step.rows, step.outcomes, running, running - proven):
            self._finish(Finished(job.claim.address, job.reply(), digests=job.digests))
        # After the replies are made: a reply of large results may be what ends the process.
        if not self._rows:
            self._track.stop()
        elif step.rows or step.displaced:
            self._track.start(self._jobs, Stage.RUN)

    def _run_step(self) -> Step:
        try:
            return self._engine.step()
        except Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - an engine's fault is the error of its rows, and ends no worker
            rows = self._rows
            self._engine.abort(rows)
            failure = error if isinstance(error, MillstreamError) else ModelFailed(described(error))
            return Step(rows, [failure] * len(rows))

    def _remove(self, rows: Rows, *, waits: bool = False) -> None:
        """Removes rows that left the engine, and jobs without rows in it. `waits`: they go on later, here."""
        now = time.monotonic()
        if len(rows) == len(self._rows):
            ended, self._jobs, self._rows = self._jobs, {}, []
            self._proven.clear()
        else:
            gone = set(map(id, rows))
            self._rows = [row for row in self._rows if id(row) not in gone]
            self._proven -= gone
            remaining = {row.owner for row in self._rows}
            ended = {name: job for name, job in self._jobs.items() if name not in remaining}
            self._jobs = {name: job for name, job in self._jobs.items() if name in remaining}
        for job in ended.values():
            job.pause(now)
        if self._emitter and not waits:
            self._emitter.forget(list(ended))

    def _account(self, step: Step, seconds: float) -> None:
        count = self._counters
        count.forwards += 1
        count.rows += step.ran
        count.tokens += step.tokens
        count.padded += step.computed
        count.errors += sum(1 for outcome in step.outcomes if isinstance(outcome, MillstreamError))
        count.busy_ms += round(seconds * 1000)
        if step.computed:
            self._window.cost.observe(step.computed, seconds)


def _missed(job: ActiveJob, now: int) -> str:
    """The phase whose time is over at `now`, or "". Queue time ends with the job's first forward, on any worker."""
    phase = job.request.missed(now)
    return "" if phase == "queue" and (job.started_at or job.records) else phase
