"""The main loop: takes rows, runs the engine step by step, returns outcomes. Owns the device, in the main thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Protocol

from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.job import Priority, Reply
from millstream.broker.contract.partial import Record
from millstream.telemetry.worker_traces import Batch, WorkerTraces
from millstream.worker.context import Context
from millstream.worker.engines.base import Engine, Remote, Step
from millstream.worker.engines.running import Jobs, Running
from millstream.worker.engines.slot_keeper import HandsOver, SlotKeeper
from millstream.worker.intake.intake import expired
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import ActiveJob, Rows, priority_of
from millstream.worker.scheduling.device_turn import Work
from millstream.worker.shutdown import Ended
from millstream.worker.supervision.progress import Stage

log = logging.getLogger(__name__)

NO_LIMITS: Mapping[Priority, float | None] = MappingProxyType({})


class Emits(Protocol):
    """Shows the output of jobs that run."""

    def put(self, job: ActiveJob, record: Record) -> None:
        """Adds output of a job."""
        ...

    def forget(self, names: Sequence[str]) -> None:
        """Emits no more of these jobs: they ended."""
        ...


class Runner:
    """Runs the window's rows until it is closed and none is left.

    An engine with records needs an `emitter`. `limits`: inference timeout by priority, seconds; an engine with slots
    keeps it. `hand_over` gets rows of such an engine that other workers are to run.
    """

    def __init__(
        self,
        context: Context,
        engine: Engine,
        finish: Callable[[Finished], None],
        emitter: Emits | None = None,
        limits: Mapping[Priority, float | None] = NO_LIMITS,
        hand_over: HandsOver | None = None,
    ) -> None:
        self._window = context.window
        self._clock = context.clock
        self._counters = context.counters
        self._histograms = context.histograms
        # Steps of a server collect answers, each of a request of its own: they are no batches.
        self._has_batches = not isinstance(engine, Remote)
        self._engine = engine
        self._track = context.progress.runner
        self._stage = context.stage
        self._threads = context.threads
        self._order = context.order
        self._service = context.service
        self._traces = context.traces
        self._finish = finish
        self._emitter = emitter
        self._running = Running(self._track)
        self._keeper: SlotKeeper | None = None
        if room := engine.room():
            self._window.use_slots(room)
            self._keeper = SlotKeeper(context, engine, self._running, finish, limits, hand_over)

    def run(self) -> None:
        engine, keeper = self._engine, self._keeper
        while True:
            if keeper and self._begin_step(keeper):
                self._running.show()
            batch = self._window.take(engine.room(), wait=not engine.busy)
            if not batch and self.drained:
                return
            self._advance(batch)

    def turn(self) -> bool:
        """Does one step of `run` without waiting, for a process with several lanes. Returns whether there was work.

        Until the next turn no time counts for rows that still run, and no death is charged to them: another lane may
        have the device.
        """
        if self._keeper:
            self._begin_step(self._keeper)
        batch = self._window.take(self._engine.room(), wait=False)
        if not batch and not self._engine.busy:
            return False
        alone = self._window.has_suspect(row.owner for row in (*batch, *self._running.rows))
        with self._stage(alone) if self._stage else nullcontext():
            if self._running.rows:
                self._running.resume()
            self._advance(batch)
            if self._running.rows:
                self._running.pause()
        return True

    def _begin_step(self, keeper: SlotKeeper) -> bool:
        """Makes rows leave the engine that have to. Returns whether any did."""
        before = self._running.rows
        ended = keeper.begin_step()
        if ended and self._emitter:
            self._emitter.forget(ended)
        return self._running.rows is not before

    @property
    def urgency(self) -> int | None:
        """Position in PRIORITIES of the most urgent row that waits or runs; None if a turn would find no work."""
        waiting = self._window.urgency
        running = min(map(priority_of, self._running.rows), default=None)
        return min((each for each in (waiting, running) if each is not None), default=None)

    @property
    def work(self) -> Work | None:
        """The work that a turn would find, and its slack; None if there is none."""
        urgency = self.urgency
        if urgency is None:
            return None
        return Work(urgency, self._window.slack_s(self._clock.now()), self._order)

    @property
    def drained(self) -> bool:
        """Whether the window is closed and no row waits or runs."""
        return self._window.closed and not self._window.waiting and not self._engine.busy

    def use_threads(self) -> None:
        """Uses this model's number of threads, after a forward of another lane's model."""
        self._threads.apply()

    def _advance(self, batch: Rows) -> None:
        if batch:
            self._admit(batch)
            if self._keeper:
                self._conclude_late(self._keeper)
        if self._engine.busy:
            self._step()
        else:
            self._track.stop()
            self._window.complete([], [])

    def _conclude_late(self, keeper: SlotKeeper) -> None:
        """Ends admitted texts whose time was over before: no forward starts for them."""
        if ended := keeper.conclude_late():
            self._running.show()
            if self._emitter:
                self._emitter.forget(ended)

    def _admit(self, batch: Rows) -> None:
        # Before the check of deadlines: this may take a while, and a job that expires meanwhile must not start.
        self._threads.adapt(idle=not self._window.waiting)
        rows, jobs = self._in_time(batch)
        self._running.add(rows, jobs, self._clock.now())
        if rows:
            self._counters.cuts[self._window.cut] += 1
            if self._keeper:
                self._keeper.note_admitted(list(jobs))
            self._track.start(self._running.jobs, Stage.RUN)
            self._engine.admit(rows)

    def _in_time(self, batch: Rows) -> tuple[Rows, Jobs]:
        """Returns the rows that may still start, and their jobs. Jobs whose time is over are finished with an error.

        It is the last check before the model. Rows whose job was ended meanwhile are dropped.
        """
        now = self._clock.now()
        found = self._window.jobs_of(batch)
        jobs = {job.name: job for job in found if job}
        missed = [name for name, job in jobs.items() if self._missed(job, now)]
        if not missed and None not in found:
            return batch, jobs
        for job in self._window.end(missed):
            error = expired(job.request, self._missed(job, now), now)
            self._finish(Finished(job.claim.address, Reply(error=error), run=job))
        in_time = {name: job for name, job in jobs.items() if name not in missed}
        return [row for row, job in zip(batch, found, strict=True) if job and job.name in in_time], in_time

    def _missed(self, job: ActiveJob, now: int) -> str:
        """The phase whose time is over at `now`, or "". Queue time ends with the job's first forward, on any worker.

        A text that has begun is concluded, see SlotKeeper: its caller gets the text so far.
        """
        phase = job.request.missed(now)
        return "" if (phase == "queue" or self._keeper) and (job.started_at or job.records) else phase

    def _step(self) -> None:
        start = time.monotonic()
        self._track.lap()
        step = self._run_step()
        seconds = time.monotonic() - start
        self._account(step, seconds)
        self._threads.observe(step.computed or step.tokens, seconds)
        if self._keeper:
            self._take_output(self._keeper, step)
        elif self._traces:
            self._trace_batch(self._traces, step, seconds)
        running = self._running
        if step.rows:
            ended = running.remove(step.rows)
            if self._emitter:
                self._emitter.forget(ended)
        room = self._engine.room() if self._keeper else None
        now = self._clock.now()
        for job in self._window.complete(step.rows, step.outcomes, running.rows, room):
            job.ended_at = now
            self._window.cost.observe_job(job.inference_ms / 1000)
            self._finish(Finished(job.claim.address, job.reply(), digests=job.digests, run=job))
        # After the replies are made: a reply of large results may be what ends the process.
        if not running.rows:
            self._track.stop()
        elif step.rows or step.displaced:
            self._track.start(running.jobs, Stage.RUN)

    def _take_output(self, keeper: SlotKeeper, step: Step) -> None:
        running = self._running
        now, now_s = self._clock.now(), time.monotonic()
        for row, record in step.records:
            if self._emitter and (job := running.jobs.get(row.owner)):
                self._histograms.add_output(job, now, now_s)
                self._emitter.put(job, record)
        running.note_records({id(row) for row, _ in step.records})
        if step.displaced:
            keeper.displace(step.displaced)

    def _run_step(self) -> Step:
        try:
            return self._engine.step()
        except Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - an engine's fault is the error of its rows, and ends no worker
            rows = self._running.rows
            self._engine.abort(rows)
            failure = error if isinstance(error, MillstreamError) else ModelFailed(described(error))
            return Step(rows, [failure] * len(rows))

    def _account(self, step: Step, seconds: float) -> None:
        count = self._counters
        count.forwards += 1
        count.rows += step.ran
        count.tokens += step.tokens
        count.padded += step.computed
        count.errors += sum(1 for outcome in step.outcomes if isinstance(outcome, MillstreamError))
        count.busy_ms += round(seconds * 1000)
        if log.isEnabledFor(logging.DEBUG):
            self._log_batch(step, seconds)
        if self._has_batches and step.tokens:
            rows = len(self._running.rows) if self._keeper else step.ran
            self._histograms.add_forward(rows, step.tokens, step.computed)
        if step.computed:
            count.padding_tokens += step.computed - step.tokens
            self._window.cost.observe(step.computed, seconds)

    def _trace_batch(self, traces: WorkerTraces, step: Step, seconds: float) -> None:
        """Makes the span of a forward that ended now, with links to the calls of its jobs."""
        jobs = self._running.jobs.values()
        contexts = [job.request.trace for job in jobs]
        made = traces.record_batch(Batch(contexts, step.ran, step.tokens, step.computed, seconds)) or ""
        for job in jobs:
            job.batch_trace = made

    def _log_batch(self, step: Step, seconds: float) -> None:
        log.debug(
            "batch: %d rows, %d tokens, %d with padding, %.1f ms",
            step.ran,
            step.tokens,
            step.computed,
            seconds * 1000,
            extra={"service": self._service},
        )
