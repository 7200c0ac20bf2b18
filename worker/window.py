"""Work that a worker holds: rows that wait for their forward, jobs with unfinished rows, unsettled entries.

Three threads share it: the claimer adds jobs, the runner takes micro-batches and returns their outcomes, the settler
removes entries whose answer is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.claims import ClaimBudget
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import BY_SHARE, SUSPECT, ActiveJob, Outcome, Rows, priority_of
from millstream.worker.scheduling.batcher import Budget, Cut, Pool
from millstream.worker.scheduling.batches import Batches
from millstream.worker.scheduling.claim_policy import RELIED_ON
from millstream.worker.scheduling.slack import Due, due_at, slack_in_order, slack_together
from millstream.worker.scheduling.slots import Slots

NO_ROWS: Rows = []

NO_ROOM_S = 0.05
"""Seconds between two looks at an idle engine that has no room."""


class Window:
    """Rows, jobs and entries that one worker process holds; thread-safe. `cost`: cost and limits of its forwards.

    `cut`: why the last micro-batch ended; for the runner's thread only. `auto_tokens`: the tokens measured on this
    device for `max_batch_tokens: auto`, None if they were not measured. `wake`, if set, is called when rows may be
    taken and when the window is closed: the main thread of several lanes waits for all of their windows. `has_slots`:
    rows wait for slots of an engine, not for batches. `targets`: response times to aim at, seconds, by priority, if the
    device is shared.
    """

    def __init__(self, budget: Budget, queue_timeout_s: float | None = None) -> None:
        # One lock, with a condition for each event: a settled job then wakes no thread that waits for another event.
        self._lock = threading.RLock()
        self.cost = ForwardCost(budget)
        self.cut: Cut = "arrival"
        self.auto_tokens: int | None = None
        self.wake: Callable[[], None] | None = None
        self._pool: Pool[Prepared] = Pool()
        self._batches = Batches(self._pool, self.cost)
        self._slots: Slots | None = None
        self.has_slots = False
        self.targets: Mapping[Priority, float] = {}
        self._claims: Batches | Slots = self._batches
        self.limit(budget.rows, budget.tokens, queue_timeout_s)
        self._chosen: Rows = []
        self._jobs: dict[str, ActiveJob] = {}
        self._unsettled: set[str] = set()
        self._suspects: set[str] = set()
        self._cancelled: set[str] = set()
        self._running = 0
        self._unproven: set[str] = set()
        self._has_unproven_suspect = False
        self._ends_at = self._forward_s = self._stepped_at = self._step_s = 0.0
        self._takes = 0
        self._closed = False
        self._is_set_aside = False
        self._rows_arrived = threading.Condition(self._lock)
        self._batch_taken = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)
        self._busy_since: float | None = None
        self._busy_s = 0.0

    def limit(
        self,
        rows: int,
        tokens: int,
        queue_timeout_s: float | None,
        inference_timeout_s: float | None = None,
        reserved_slots: int = 0,
        is_fair: bool = False,
    ) -> None:
        """Applies changed limits, from the next micro-batch on. `is_fair`: tenants share the claims."""
        self.cost.limit(rows, tokens, inference_timeout_s)
        self._batches.limit(queue_timeout_s, is_fair)
        self._is_fair = is_fair
        if self._slots:
            self._slots.reserved = reserved_slots

    def use_slots(self, room: Budget) -> None:
        """Makes rows wait for slots instead of batches. `room`: that of the engine, which holds no row yet."""
        self._slots = self._claims = Slots(self._pool, self.cost, room)
        self.has_slots = True

    @property
    def budget(self) -> Budget:
        """Limits of a forward."""
        return self.cost.budget

    # -- the claimer's side ------------------------------------------------------------------------------------

    def hold(self, jobs: Sequence[ActiveJob]) -> list[ActiveJob]:
        """Adds jobs, whose rows may then be taken. Returns those that were cancelled before; they are not added."""
        with self._lock:
            cancelled = [job for job in jobs if job.name in self._cancelled] if self._cancelled else []
            live = [job for job in jobs if job not in cancelled] if cancelled else jobs
            self._cancelled.clear()
            for job in live if self.targets else ():
                job.note_due(due_at(job.request, self.targets[job.claim.address.priority]))
            self._unsettled.update([job.name for job in jobs])
            self._jobs.update({job.name: job for job in live})
            self._pool.add([row for job in live for row in job.rows()])
            self._note_busy()
            self._note_arrival()
            return cancelled

    def keep(self, names: Collection[str], suspects: Collection[str] = ()) -> None:
        """Notes entries as held whose jobs are not added yet, or that only need an answer, as malformed ones do.

        `suspects`: those that were charged an attempt before.
        """
        with self._lock:
            self._unsettled.update(names)
            self._suspects.update(suspects)

    def room(
        self, live_workers: int = 1, max_attempts: int = 3, last_job: tuple[int, int] = (1, 1)
    ) -> ClaimBudget | None:
        """Budget of a claim now; None if the window is full. `last_job`: rows and tokens of the last claimed job."""
        with self._lock:
            held = len(self._unsettled)
            return self._claims.room(held, not (held or self._running), live_workers, max_attempts, last_job)

    def urgent_room(self) -> ClaimBudget | None:
        """Budget of a claim of more urgent jobs into a full window; None if enough of them wait already."""
        with self._lock:
            return self._claims.urgent_room()

    def suspect_room(self, stream: int, live_workers: int) -> ClaimBudget | None:
        """Budget of a claim of suspects of `stream`, 1 to 3, that run before the waiting rows.

        None if they would not: if no row waits and none is proven, or more urgent rows wait.
        """
        with self._lock:
            # Rows that run and are proven need not end first.
            if not (self._pool.count or self._has_proven):
                return None
            return self._claims.suspect_room(stream, live_workers, len(self._unsettled))

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Lets only rows of suspects be taken meanwhile. The other rows wait, and no death is charged to them."""
        self._is_set_aside = True
        try:
            yield
        finally:
            with self._lock:
                self._is_set_aside = False
                self._note_arrival()

    def wait_until_at_rest(self, timeout: float) -> bool:
        """Sleeps until every held job waits or is proven, and no suspect is held; False after `timeout` seconds.

        A job that runs is proven once the server has output of this run, see `prove`.
        """
        with self._lock:
            return self._emptied.wait_for(lambda: self._is_at_rest, timeout)

    @property
    def _is_at_rest(self) -> bool:
        # An unsettled entry without a job is being prepared, or its answer is being written. A job without an unsettled
        # entry was taken over by another worker, and is in no stage.
        unproven = self._unproven if self._slots else self._running
        return not (unproven or self._pool.waiting(SUSPECT)) and self._unsettled <= self._jobs.keys()

    @property
    def _has_proven(self) -> bool:
        return self._slots is not None and self._running > len(self._unproven)

    @property
    def takes(self) -> int:
        """Number of micro-batches taken so far; with slots, also of times that rows left them. Each makes room."""
        return self._takes

    def wait_for_take(self, timeout: float) -> bool:
        """Sleeps until `takes` changes or more jobs could be claimed at once; False after `timeout` seconds."""
        with self._lock:
            takes = self._takes
            slots = self._slots
            return self._batch_taken.wait_for(
                lambda: (
                    self._takes != takes or self._closed or (not self._pool.count and (slots is None or slots.free > 0))
                ),
                timeout,
            )

    @property
    def forward_left_s(self) -> float:
        """Predicted seconds until the running forward ends; 0.0 if none runs."""
        return max(0.0, self._ends_at - time.monotonic()) if self._running else 0.0

    @property
    def held_back_s(self) -> float:
        """Seconds until a worker of a fair service claims the rows of its next forward: 0.0 for others.

        What is claimed late has the jobs of tenants that came meanwhile.
        """
        if not self._is_fair or self._slots:
            return 0.0
        return max(0.0, self.forward_left_s - (1 - RELIED_ON) * self._forward_s)

    def wait_until_empty(self, timeout: float) -> bool:
        """Sleeps until the window is `empty`; False after `timeout` seconds."""
        with self._lock:
            return self._emptied.wait_for(lambda: self.empty, timeout)

    @property
    def is_apart(self) -> bool:
        """Whether rows have slots, and no suspect waits or runs without output: others may run beside it again."""
        return self._slots is not None and self._is_at_rest

    @property
    def running(self) -> bool:
        """Whether a forward runs."""
        return self._running > 0

    @property
    def idle(self) -> bool:
        """Whether no forward runs and no row waits."""
        with self._lock:
            return not self._running and not self._pool.count

    @property
    def empty(self) -> bool:
        """Whether every held entry is settled and no forward runs. A forward counts even if all its jobs were ended."""
        return not self._unsettled and not self._running

    @property
    def waiting(self) -> bool:
        """Whether prepared rows wait for the runner."""
        # No lock: it reads one number.
        return self._pool.count > 0

    @property
    def waiting_rows(self) -> int:
        """Number of prepared rows that wait for the runner."""
        return self._pool.count

    def waiting_of(self, priority: Priority) -> int:
        """Number of prepared rows of `priority` that wait for the runner, without those that spend its share."""
        with self._lock:
            return self._pool.waiting(PRIORITIES.index(priority))

    def spend_share(self, priority: Priority, rows: int) -> int:
        """Lets up to `rows` rows of `priority` run before more urgent ones, oldest first. Returns their number.

        Moves none if `rows` is neither a whole micro-batch nor all that wait: a few rows would need an extra forward.
        With slots, one row is enough.
        """
        with self._lock:
            rank = PRIORITIES.index(priority)
            if rows < min(self._claims.least_share(), self._pool.waiting(rank)):
                return 0
            return self._pool.move(rank, BY_SHARE, rows)

    def busy_s(self) -> float:
        """Total seconds during which at least one row waited here or ran."""
        with self._lock:
            since = self._busy_since
            return self._busy_s + (time.monotonic() - since if since is not None else 0.0)

    def close(self) -> None:
        """Accepts no more jobs: the runner ends when the pool is empty."""
        with self._lock:
            self._closed = True
            self._note_arrival()
            self._batch_taken.notify_all()

    # -- the runner's side -------------------------------------------------------------------------------------

    def take(self, room: Budget | None = None, *, wait: bool = True) -> Rows:
        """Returns the next micro-batch, and waits for it if `wait` says so; empty if no row may run now.

        `room` limits it further: to the rows and tokens that an engine can add to those that it runs.
        """
        with self._lock:
            if room is not None and self._slots:
                # Though no row may wait: claims depend on it.
                self._note_room(self._slots, room)
            if wait:
                self._rows_arrived.wait_for(lambda: self._may_be_taken or self._closed)
            elif not self._may_be_taken:
                return []
            if room is not None:
                return self._slot_rows(wait)
            budget = self.cost.one_forward()
            batch = self._pool.take(budget, self._chosen)
            self._chosen = []
            by_time = self._pool.cut == "tokens" and budget.tokens < self.budget.tokens
            self.cut = "time" if by_time else self._pool.cut
            self._forward_s = self.cost.predicted_s(budget.computed(batch))
            self._ends_at = time.monotonic() + self._forward_s
            self._running += len(batch)
            self._takes += 1
            self._batch_taken.notify_all()
            return batch

    def _slot_rows(self, wait: bool) -> Rows:
        assert self._slots, "use_slots was not called"
        self.cut = "arrival"
        rows = self._slots.take(suspects_only=self._suspects_only)
        if rows and not self._running:
            self._stepped_at = time.monotonic()
        self._has_unproven_suspect |= any(row.urgency[0] == SUSPECT for row in rows)
        self._running += len(rows)
        self._unproven.update([row.owner for row in rows])
        if rows:
            self._takes += 1
            self._batch_taken.notify_all()
        elif wait and not self._closed:
            # An engine that has no room though it is idle: it may have some later.
            self._rows_arrived.wait(NO_ROOM_S)
        return rows

    @property
    def _suspects_only(self) -> bool:
        """Whether other rows have to wait for slots: until each suspect that runs has output."""
        return self._is_set_aside or self._has_unproven_suspect

    def _note_arrival(self) -> None:
        self._rows_arrived.notify_all()
        if self.wake:
            self.wake()

    @property
    def closed(self) -> bool:
        """Whether it accepts no more jobs."""
        return self._closed

    @property
    def urgency(self) -> int | None:
        """Position in PRIORITIES of the most urgent row that may be taken now; None if there is none."""
        with self._lock:
            ranks = [SUSPECT] if self._is_set_aside else self._pool.ranks()
            return min((priority_of(row) for rank in ranks if (row := self._pool.first(rank))), default=None)

    def slack_s(self, now: int) -> float:
        """Seconds that the held jobs may still wait at `now`, server ms, by their targets and measured times."""
        with self._lock:
            cost, since = self.cost, time.monotonic()
            if self._slots:
                work = [(job, max(0.0, cost.job_s - job.in_model_s(since))) for job in self._jobs.values()]
                return slack_together(Due((job.due_at - now) / 1000, work_s) for job, work_s in work)
            token_s = cost.per_token_s(min(self._pool.tokens, cost.budget.tokens))
            jobs = [Due((job.due_at - now) / 1000, token_s * job.tokens) for job in self._jobs.values()]
            return slack_in_order(jobs, token_s * cost.budget.overhead)

    @property
    def _may_be_taken(self) -> bool:
        """Whether rows wait that may run now."""
        return bool(self._pool.waiting(SUSPECT) if self._is_set_aside else self._pool.count)

    def upcoming(self) -> Sequence[Prepared]:
        """Payloads of the next micro-batch, which `take` returns unless a more urgent row arrives.

        Empty if the waiting rows do not fill a micro-batch: rows that arrive before the take may join them.
        """
        with self._lock:
            chosen = self._pool.choose(self.cost.one_forward())
            self._chosen = [] if self._pool.cut == "arrival" else chosen
            return [row.payload for row in self._chosen]

    def jobs_of(self, rows: Rows) -> list[ActiveJob | None]:
        """The job of each taken row; None if it was ended meanwhile."""
        job_of = self._jobs.get
        # The entry may be held a second time: lost while it ran, given back by another worker, and claimed again.
        return [job if (job := job_of(row.owner)) and job.prepared[row.index] is row.payload else None for row in rows]

    def complete(
        self,
        rows: Rows,
        outcomes: Sequence[Outcome],
        running: Rows = NO_ROWS,
        room: Budget | None = None,
    ) -> list[ActiveJob]:
        """Notes outcomes of rows that ended, and that the rows `running` still run. Returns the jobs that are complete.

        `room`: that of an engine with slots now. Its lane may get no turn before another job is claimed.
        """
        with self._lock:
            done = []
            for row, job, outcome in zip(rows, self.jobs_of(rows), outcomes, strict=True):
                if job is None:
                    continue
                job.outcomes[row.index] = outcome
                job.rows_left -= 1
                if not job.rows_left:
                    done.append(self._jobs.pop(row.owner))
            if self._slots:
                self._note_slots(self._slots, running)
                if room is not None:
                    self._note_room(self._slots, room)
                    self._note_step()
            self._running = len(running)
            if self._unproven:
                self._unproven.intersection_update([row.owner for row in running])
            self._has_unproven_suspect &= bool(self._unproven)
            self._note_busy()
            self._note_empty()
            return done

    def prove(self, names: Collection[str]) -> None:
        """Notes that the server has output of these jobs' runs, so that earlier deaths do not count against them.

        Before that a suspect must not run beside them: its death would be charged to them, too.
        """
        with self._lock:
            if self._unproven:
                self._unproven.difference_update(names)
                self._has_unproven_suspect &= bool(self._unproven)
                self._note_empty()

    def is_proven(self, name: str) -> bool:
        """Whether the server has output of this job's run."""
        return name not in self._unproven

    def _note_step(self) -> None:
        """Predicts that the next step of rows in slots takes as long as the shorter one of the last two."""
        now = time.monotonic()
        took_s, self._stepped_at = now - self._stepped_at, now
        self._ends_at, self._step_s = now + min(took_s, self._step_s), took_s

    def _note_slots(self, slots: Slots, running: Rows) -> None:
        slots.note_running(map(priority_of, running))
        if len(running) < self._running:
            self._takes += 1
            self._batch_taken.notify_all()

    def _note_room(self, slots: Slots, room: Budget) -> None:
        slots.note_room(room)
        if slots.free and not self._pool.count:
            self._batch_taken.notify_all()

    def claimants(self, room: Budget) -> list[int]:
        """The waiting rows for which the engine's `room` has no slot, as Slots.claimants names them."""
        with self._lock:
            assert self._slots, "use_slots was not called"
            self._slots.note_room(room)
            return self._slots.claimants(suspects_only=self._suspects_only)

    def holds(self, job: ActiveJob) -> bool:
        """Whether this job has not ended."""
        return self._jobs.get(job.name) is job

    def begun(self) -> Mapping[str, ActiveJob]:
        """The jobs by name whose rows wait and have output of earlier runs, on any worker."""
        with self._lock:
            waiting = (self._jobs.get(row.owner) for rank in self._pool.ranks() for row in self._pool.rows(rank))
            return {job.name: job for job in waiting if job and (job.records or job.displaced)}

    def waiting_jobs(self) -> list[str]:
        """Names of the jobs whose rows wait."""
        with self._lock:
            return list({row.owner for rank in self._pool.ranks() for row in self._pool.rows(rank)})

    def put_back(self, rows: Rows) -> None:
        """Makes rows that were taken wait again, those of ended jobs excepted."""
        with self._lock:
            self._pool.add([row for row, job in zip(rows, self.jobs_of(rows), strict=True) if job])
            self._note_arrival()

    def withdraw(self, names: Collection[str]) -> Rows:
        """Removes the waiting rows of these jobs and returns them. The jobs stay."""
        with self._lock:
            return self._pool.drop(names)

    def end(self, names: Collection[str]) -> list[ActiveJob]:
        """Ends jobs that expired or that another worker took over, and drops their waiting rows. Returns the jobs."""
        with self._lock:
            self._pool.drop(names)
            ended = [self._jobs.pop(name) for name in names if name in self._jobs]
            self._note_busy()
            self._batch_taken.notify_all()
            return ended

    def cancel(self, names: Collection[str]) -> list[ActiveJob]:
        """Ends jobs that were cancelled, as `end`. Jobs that are claimed and not added yet are ended by `hold`."""
        with self._lock:
            self._cancelled.update(name for name in names if name in self._unsettled and name not in self._jobs)
            return self.end(names)

    def overdue(self, limits: Mapping[Priority, float | None], now: float) -> list[str]:
        """Names of jobs that were in the model for longer than their priority's limit. `now`: monotonic seconds."""
        with self._lock:
            return [
                job.name
                for job in self._jobs.values()
                if (limit := limits.get(job.claim.address.priority)) is not None and job.in_model_s(now) > limit
            ]

    def _note_busy(self) -> None:
        is_busy = bool(self._running or self._pool.count)
        if is_busy and self._busy_since is None:
            self._busy_since = time.monotonic()
        elif not is_busy and self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None

    def _note_empty(self) -> None:
        if self.empty or ((self._is_set_aside or self._slots) and self._is_at_rest):
            self._emptied.notify_all()

    # -- the settler's and the heartbeat's side ----------------------------------------------------------------

    def forget(self, names: Collection[str]) -> None:
        """Removes entries that are settled, or no longer this worker's."""
        with self._lock:
            self._unsettled.difference_update(names)
            if self._suspects:
                self._suspects.difference_update(names)
            self._note_empty()

    def has_suspect(self, names: Iterable[str]) -> bool:
        """Whether any of these entries is a suspect. The set only grows before an entry's first stage, so no lock."""
        return bool(self._suspects) and not self._suspects.isdisjoint(names)

    def names(self) -> list[str]:
        """Names of all entries held and not yet settled, in the form that the scripts use."""
        with self._lock:
            return list(self._unsettled)
