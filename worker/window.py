"""What a worker holds: rows that wait for their forward, jobs that wait for a row, entries not yet settled.

Three threads meet here: the claimer adds jobs, the runner takes micro-batches and hands rows back, the settler forgets
jobs whose answer is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, ClaimBudget
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import BY_SHARE, SUSPECT, ActiveJob, Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Cut, Pool
from millstream.worker.scheduling.fair_share import SAVED_BATCHES

HOLD_S = 1.0
"""About this much predicted work is held, and half the queue timeout at most: a hoarder starves its neighbours."""

LEAST_BATCHES = 4
"""Held also where they take longer than that, unless a queue timeout presses: fewer rows to choose among pad more."""

HOLD_BATCHES = 8


class Window:
    """What one worker process holds; thread-safe. `cost` says what its forwards cost and how large they may be.

    `cut` says, in the runner's thread, what ended the micro-batch taken last. `auto_tokens` is what the device was
    measured to make of `max_batch_tokens: auto`.
    """

    def __init__(self, budget: Budget, queue_timeout_s: float | None = None) -> None:
        # One lock; who waits for what is woken by that alone, and not by each job that another thread settles.
        self._lock = threading.RLock()
        self.cost = ForwardCost(budget)
        self.limit(budget.rows, budget.tokens, queue_timeout_s)
        self.cut: Cut = "arrival"
        self.auto_tokens: int | None = None
        self._pool: Pool[Prepared] = Pool()
        self._chosen: Rows = []
        self._jobs: dict[str, ActiveJob] = {}
        self._unsettled: set[str] = set()
        self._cancelled: set[str] = set()
        self._running = 0
        self._ends_at = 0.0
        self._takes = 0
        self._closed = False
        self._is_set_aside = False
        self._rows_arrived = threading.Condition(self._lock)
        self._batch_taken = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        self._busy_since: float | None = None
        self._busy_s = 0.0

    def limit(
        self, rows: int, tokens: int, queue_timeout_s: float | None, inference_timeout_s: float | None = None
    ) -> None:
        """Take over changed limits, from the next micro-batch on."""
        self.cost.limit(rows, tokens, inference_timeout_s)
        self._hold_s = HOLD_S if queue_timeout_s is None else min(HOLD_S, queue_timeout_s / 2)
        self._least_batches = LEAST_BATCHES if queue_timeout_s is None else 1

    @property
    def budget(self) -> Budget:
        """The limits of a forward."""
        return self.cost.budget

    # -- the claimer's side ------------------------------------------------------------------------------------

    def hold(self, jobs: Sequence[ActiveJob]) -> list[ActiveJob]:
        """Add jobs; their rows may be taken from now on. Those that were cancelled on their way here are returned."""
        with self._lock:
            cancelled = [job for job in jobs if job.name in self._cancelled] if self._cancelled else []
            live = [job for job in jobs if job not in cancelled] if cancelled else jobs
            self._cancelled.clear()
            self._unsettled.update([job.name for job in jobs])
            self._jobs.update({job.name: job for job in live})
            self._pool.add([row for job in live for row in job.rows()])
            self._note_busy()
            self._rows_arrived.notify_all()
            return cancelled

    def keep(self, names: Collection[str]) -> None:
        """Note entries that are held only to be settled: malformed, expired, exhausted."""
        with self._lock:
            self._unsettled.update(names)

    def room(
        self, live_workers: int = 1, max_attempts: int = 3, last_job: tuple[int, int] = (1, 1)
    ) -> ClaimBudget | None:
        """What may be claimed now on top of what waits; None if the window is full. `last_job`: its rows and tokens."""
        with self._lock:
            budget, waiting, most = self.cost.budget, len(self._pool), self._most_tokens()
            rows, tokens = HOLD_BATCHES * budget.rows - waiting, most - self._pool.tokens
            if rows <= 0 or tokens <= 0:
                return None
            return ClaimBudget(
                jobs=min(MAX_JOBS_PER_CALL, rows),
                rows=rows,
                tokens=tokens,
                live_workers=live_workers,
                empty_handed=not (self._unsettled or self._running),
                held=len(self._unsettled),
                next_rows=max(0, budget.rows - waiting) if self._pool.tokens < budget.tokens else 0,
                max_attempts=max_attempts,
                job=last_job,
                large=(SAVED_BATCHES * budget.rows, most),
            )

    def urgent_room(self) -> ClaimBudget | None:
        """What may be claimed of realtime jobs though the window is full: one micro-batch waits at most."""
        with self._lock:
            budget = self.budget
            rows = budget.rows - self.waiting_of(Priority.REALTIME)
            if rows <= 0:
                return None
            return ClaimBudget(min(MAX_JOBS_PER_CALL, rows), rows, tokens=budget.tokens, streams=1, returned=1)

    def suspect_room(self, stream: int, live_workers: int) -> ClaimBudget | None:
        """What may be claimed of suspects of `stream`, 1 to 3, to run before what waits here.

        None if nothing waits here, if some of it is more urgent, or if it is more than two full windows: jobs that
        came with no suspect among them.
        """
        with self._lock:
            waiting, rows, tokens = len(self._pool), HOLD_BATCHES * self.budget.rows, self._most_tokens()
            more_urgent = (BY_SHARE, *range(stream - 1))
            if not waiting or any(self._pool.waiting(rank) for rank in more_urgent):
                return None
            if waiting > 2 * rows or self._pool.tokens > 2 * tokens:
                return None
            return ClaimBudget(
                jobs=min(MAX_JOBS_PER_CALL, rows),
                rows=rows,
                tokens=tokens,
                live_workers=live_workers,
                empty_handed=True,
                held=len(self._unsettled),
                next_rows=self.budget.rows,
            )

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Meanwhile only rows of suspects are taken: the other rows that wait stay in no stage."""
        self._is_set_aside = True
        try:
            yield
        finally:
            with self._lock:
                self._is_set_aside = False
                self._rows_arrived.notify_all()

    def wait_until_at_rest(self, timeout: float) -> bool:
        """Sleep until all that is held waits for a forward and no suspect is held; False after `timeout` seconds."""
        with self._lock:
            return self._emptied.wait_for(lambda: self._is_at_rest, timeout)

    @property
    def _is_at_rest(self) -> bool:
        # What is unsettled and not held is on its way to the pool, or to the server. What is held and settled was taken
        # over by another worker, and is in no stage.
        return not (self._running or self._pool.waiting(SUSPECT)) and self._unsettled <= self._jobs.keys()

    def _most_tokens(self) -> int:
        return max(self._least_batches * self.cost.budget.tokens, self.cost.tokens_in(self._hold_s))

    @property
    def takes(self) -> int:
        """How many micro-batches were taken so far."""
        return self._takes

    def wait_for_take(self, timeout: float) -> bool:
        """Sleep until the runner takes its next micro-batch or the pool is empty; False after `timeout` seconds."""
        with self._lock:
            takes = self._takes
            return bool(
                self._batch_taken.wait_for(lambda: self._takes != takes or not len(self._pool) or self._closed, timeout)
            )

    @property
    def forward_left_s(self) -> float:
        """Seconds until the forward under way should be over, as long as those before it took; 0.0 where none is."""
        return max(0.0, self._ends_at - time.monotonic()) if self._running else 0.0

    def wait_until_empty(self, timeout: float) -> bool:
        """Sleep until this is `empty`; False after `timeout` seconds."""
        with self._lock:
            return self._emptied.wait_for(lambda: self.empty, timeout)

    @property
    def running(self) -> bool:
        """Whether a forward runs."""
        return self._running > 0

    @property
    def idle(self) -> bool:
        """Whether the runner has nothing to do and nothing to take."""
        with self._lock:
            return not self._running and not len(self._pool)

    @property
    def empty(self) -> bool:
        """Whether every held entry is settled and no forward runs, not even one whose jobs were ended."""
        return not self._unsettled and not self._running

    @property
    def waiting(self) -> bool:
        """Whether prepared rows wait for the runner."""
        # One number, read without the lock.
        return bool(len(self._pool))

    def waiting_of(self, priority: Priority) -> int:
        """Prepared rows of `priority` that wait for the runner, but for those that spend its share."""
        with self._lock:
            return self._pool.waiting(PRIORITIES.index(priority))

    def spend_share(self, priority: Priority, rows: int) -> int:
        """Let rows of `priority` run before more urgent ones, oldest first; how many.

        A whole micro-batch or all that wait, else none: a few rows would cost a forward of their own.
        """
        with self._lock:
            rank = PRIORITIES.index(priority)
            if rows < min(self.budget.rows, self._pool.waiting(rank)):
                return 0
            return self._pool.move(rank, BY_SHARE, rows)

    def busy_s(self) -> float:
        """Seconds, in all, during which at least one row waited here or ran."""
        with self._lock:
            since = self._busy_since
            return self._busy_s + (time.monotonic() - since if since is not None else 0.0)

    def close(self) -> None:
        """No more jobs will come: the runner ends when the pool is empty."""
        with self._lock:
            self._closed = True
            self._rows_arrived.notify_all()
            self._batch_taken.notify_all()

    # -- the runner's side -------------------------------------------------------------------------------------

    def take(self) -> Rows:
        """The next micro-batch, waiting for one; empty when the window is closed and nothing is left."""
        with self._lock:
            self._rows_arrived.wait_for(lambda: self._may_be_taken or self._closed)
            budget = self.cost.one_forward()
            batch = self._pool.take(budget, self._chosen)
            self._chosen = []
            by_time = self._pool.cut == "tokens" and budget.tokens < self.budget.tokens
            self.cut = "time" if by_time else self._pool.cut
            self._running = len(batch)
            self._ends_at = time.monotonic() + self.cost.predicted_s(budget.computed(batch))
            self._takes += 1
            self._batch_taken.notify_all()
            return batch

    @property
    def _may_be_taken(self) -> bool:
        """Whether rows wait, and may run now."""
        return bool(self._pool.waiting(SUSPECT) if self._is_set_aside else len(self._pool))

    def upcoming(self) -> Sequence[Prepared]:
        """What the next micro-batch will be, unless something more urgent comes.

        Empty where it would gain by what arrives until then: fixed now, a few rows would make a forward of their own.
        """
        with self._lock:
            chosen = self._pool.choose(self.cost.one_forward())
            self._chosen = [] if self._pool.cut == "arrival" else chosen
            return [row.payload for row in self._chosen]

    def jobs_of(self, rows: Rows) -> list[ActiveJob | None]:
        """The job of each row taken; None where it was dropped or ended meanwhile."""
        job_of = self._jobs.get
        # The same entry may be here again: lost while it ran, given back by others, and claimed anew.
        return [job if (job := job_of(row.owner)) and job.prepared[row.index] is row.payload else None for row in rows]

    def complete(self, rows: Rows, outcomes: Sequence[Outcome]) -> list[ActiveJob]:
        """Put rows back with their outcomes; the jobs that are complete by it."""
        with self._lock:
            done = []
            for row, job, outcome in zip(rows, self.jobs_of(rows), outcomes, strict=True):
                if job is None:
                    continue
                job.outcomes[row.index] = outcome
                job.rows_left -= 1
                if not job.rows_left:
                    done.append(self._jobs.pop(row.owner))
            self._running = 0
            self._note_busy()
            self._note_empty()
            return done

    def end(self, names: Collection[str]) -> list[ActiveJob]:
        """Stop jobs before their end, their waiting rows with them: expired, or taken over by another worker."""
        with self._lock:
            self._pool.drop(names)
            ended = [self._jobs.pop(name) for name in names if name in self._jobs]
            self._note_busy()
            self._batch_taken.notify_all()
            return ended

    def cancel(self, names: Collection[str]) -> list[ActiveJob]:
        """As `end`, for jobs nobody wants any more; those that are claimed and not here yet are ended by `hold`."""
        with self._lock:
            self._cancelled.update(name for name in names if name in self._unsettled and name not in self._jobs)
            return self.end(names)

    def overdue(self, limits: Mapping[Priority, float | None], now: float) -> list[str]:
        """The jobs that have been in the model for longer than their priority's limit. `now`: monotonic seconds."""
        with self._lock:
            return [
                job.name
                for job in self._jobs.values()
                if (limit := limits.get(job.claim.address.priority)) is not None and job.in_model_s(now) > limit
            ]

    def _note_busy(self) -> None:
        is_busy = bool(self._running or len(self._pool))
        if is_busy and self._busy_since is None:
            self._busy_since = time.monotonic()
        elif not is_busy and self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None

    def _note_empty(self) -> None:
        if self.empty or (self._is_set_aside and self._is_at_rest):
            self._emptied.notify_all()

    # -- the settler's and the beat's side ---------------------------------------------------------------------

    def forget(self, names: Collection[str]) -> None:
        """These entries are settled, or no longer ours."""
        with self._lock:
            self._unsettled.difference_update(names)
            self._note_empty()

    def names(self) -> list[str]:
        """Every entry held and not yet settled, as the scripts name them."""
        with self._lock:
            return list(self._unsettled)
