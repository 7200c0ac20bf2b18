"""Thread that claims jobs, prepares their rows, and keeps the window filled while the model is busy."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from millstream.broker.contract.job import PRIORITIES, Claim, Priority
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.lease import SUSPECT_ATTEMPTS, Lease
from millstream.broker.queue.streams import Streams
from millstream.broker.transport.connection import is_missing_group, is_transient
from millstream.worker.context import Context
from millstream.worker.intake.intake import NO_RECORDS, Intake, cancelled
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling import claim_policy
from millstream.worker.scheduling.batch_delay import BatchDelay
from millstream.worker.scheduling.claim_policy import State, next_step
from millstream.worker.scheduling.fair_share import CLASSES, FairShare

log = logging.getLogger(__name__)

MOST_WAITS = 5
"""Most waits, of SLEEP_S seconds, for answers to be settled while no forward runs; then no suspect is claimed."""

SLEEP_S = 1.0
"""Seconds of one blocking read. An idle worker sees jobs that were given back at most this late."""

LEAST_WAIT_S = 0.002
"""Seconds of the shortest wait for more jobs."""

LOOK_S = 0.01
"""Seconds between two looks whether a forward has ended, while a worker of a fair service claims nothing."""

PAUSED_S = 0.25
"""Seconds between two claims from a paused service."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Queue:
    """The claimer's access to its service. `streams` has its own connection, on which the claimer blocks for jobs."""

    streams: Streams
    lease: Lease


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules of the claimer: when to wait for more jobs, for how long by priority (seconds), and each class's share.

    `supervised`: if this process dies, a supervisor knows which jobs were in a stage and which only waited.
    """

    batch_delay: BatchDelay
    batch_timeouts: dict[Priority, float]
    fair_share: FairShare
    supervised: bool = False


class Claimer(threading.Thread):
    """Claims until the process drains, then closes the window. `live_workers`: their number at the last heartbeat.

    claim_policy.py decides the next step.
    """

    def __init__(
        self,
        context: Context,
        queue: Queue,
        intake: Intake,
        policy: Policy,
        finish: Callable[[Finished], None],
    ) -> None:
        super().__init__(name="claimer", daemon=True)
        self._consumer = context.consumer
        self._window = context.window
        self._clock = context.clock
        self._shutdown = context.shutdown
        self._stage = context.stage
        self._queue = queue
        self._intake = intake
        self._batch_delay = policy.batch_delay
        self._batch_timeouts = policy.batch_timeouts
        self._fair_share = policy.fair_share
        self._supervised = policy.supervised
        self._sought_at = -math.inf
        self._finish = finish
        self._busy_s = 0.0
        self._last_claim = claim_policy.FIRST
        self._last_job = (1, 1)
        self._pause_s = 0.0
        self._gathered: list[str] = []
        self.live_workers = 1

    @property
    def paused(self) -> bool:
        """Whether the last claim got no job because the service is paused."""
        return self._last_claim.paused

    def run(self) -> None:
        with self._shutdown.guard():
            while not self._shutdown.draining:
                self._step()
        self._window.close()

    def _step(self) -> None:
        try:
            self._recover()
            self._do(next_step(self._state()))
        except Exception as error:
            self._window.forget(self._gathered)
            self._gathered.clear()
            self._last_claim = claim_policy.FIRST
            if is_missing_group(error):
                # After FLUSHALL or a lost stream: new groups start at the first entry, so that none is skipped.
                self._queue.streams.create_groups()
            elif is_transient(error):
                self._back_off(error)
            else:
                raise

    def _back_off(self, error: Exception) -> None:
        if not self._pause_s:
            log.warning("the server is away, claiming goes on when it is back: %s", error)
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        self._shutdown.pause(self._pause_s)

    def _recover(self) -> None:
        """Gives back, after a fault, entries that were delivered to this worker in a reply that never arrived."""
        if self._pause_s:
            self._queue.streams.create_groups()
            lost = self._queue.lease.release(self._consumer, keep=self._window.names())
            log.warning("the server is back; %d claimed jobs whose delivery was cut off are given back", lost)
            self._pause_s = 0.0

    def _state(self) -> State:
        window, last_claim = self._window, self._last_claim
        # Read `takes` before the room: a take in between then counts as later, and the claim is tried again.
        takes, room = window.takes, self._room()
        # Only a full window or suspects need these values, so they are not computed for every job.
        is_full = room is None or last_claim.blocked or last_claim.suspects
        return State(
            last_claim,
            room=room,
            urgent_room=window.urgent_room() if is_full else None,
            waiting=window.waiting,
            empty_handed=window.empty,
            takes=takes,
            forward_left_s=window.forward_left_s,
            saved=[0 if window.waiting_of(each) else rows for each, rows in self._saved()] if is_full else (0, 0),
            batch_rows=window.budget.rows,
            less_urgent=bool(is_full) and any(map(window.waiting_of, CLASSES)),
            suspect_room=self._suspect_room() if last_claim.suspects else None,
            has_slots=window.has_slots,
            is_apart=last_claim.alone and window.is_apart,
            held_back_s=window.held_back_s,
        )

    def _suspect_room(self) -> ClaimBudget | None:
        """Budget of a claim of suspects; None for SLEEP_S after a search found none.

        The reported suspect may be a large job, which waits until this worker is free.
        """
        if not self._supervised or time.monotonic() - self._sought_at < SLEEP_S:
            return None
        room = self._window.suspect_room(self._last_claim.suspects, self.live_workers)
        return room and room._replace(max_attempts=self._intake.max_attempts, job=self._last_job)

    def _room(self) -> ClaimBudget | None:
        return self._window.room(self.live_workers, self._intake.max_attempts, self._last_job)

    def _do(self, step: claim_policy.Step) -> None:
        match step:
            case claim_policy.Claim(limit):
                self._fill(limit)
            case claim_policy.Overtake(limit):
                self._hold(self._claim(limit).claims)
            case claim_policy.SleepInRedis(limit):
                self._sleep(limit)
            case claim_policy.WaitForTake(seconds):
                if not self._window.wait_for_take(seconds):
                    self._last_claim = self._last_claim._replace(waited=True)
            case claim_policy.WaitUntilEmpty():
                self._wait_until_empty()
            case claim_policy.RunSuspects(limit):
                self._run_suspects(limit)
            case claim_policy.HoldBack(seconds):
                # The prediction may be too long: the forward may end sooner.
                self._shutdown.pause(min(seconds, LOOK_S))
            case claim_policy.Pause():
                self._shutdown.pause(PAUSED_S)
                self._last_claim = self._last_claim._replace(waited=True)

    def _fill(self, limit: ClaimBudget) -> None:
        claims = self._claim(limit).claims
        if self._last_claim.alone:
            # No other job may run with suspects.
            self._hold(claims)
        elif claims:
            self._hold(self._wait_for_more(claims, limit))

    def _run_suspects(self, limit: ClaimBudget) -> None:
        """Runs groups of suspects, each alone and settled before the next. Ends if a claim brings more urgent jobs."""
        suspects, found = self._last_claim.suspects, False
        with self._window.set_aside():
            while self._wait_until_at_rest():
                self._hold(self._claim(limit).claims)
                if not self._last_claim.alone:
                    break
                found = True
                # The share of their class pays for the first group only.
                limit = limit._replace(streams=max(limit.streams, suspects - 1))
        self._sought_at = -math.inf if found else time.monotonic()
        if not found:
            self._last_claim = self._last_claim._replace(suspects=self._last_claim.suspects or suspects)

    def _wait_until_empty(self) -> None:
        if self._window.has_slots and self._last_claim.alone:
            # Suspects with output are none any more; their texts may run for long.
            self._window.wait_until_at_rest(SLEEP_S)
        else:
            self._window.wait_until_empty(SLEEP_S)

    def _wait_until_at_rest(self) -> bool:
        """Waits until no held job is in a stage; False if the process drains or answers cannot be settled."""
        waits = 0
        while not self._shutdown.draining and waits < MOST_WAITS:
            if self._window.wait_until_at_rest(SLEEP_S):
                return True
            waits += not self._window.running
        return False

    def _sleep(self, limit: ClaimBudget) -> None:
        """Blocks in Redis until a job comes, and holds it with the jobs claimed at the same time."""
        takes = self._window.takes
        claimed = self._queue.streams.wait(self._consumer, SLEEP_S, self._saving(limit))
        self._note(claimed)
        self._last_claim = self._last_claim.then(claimed, limit, takes, asleep=True)
        # The reply may have been read late: a process can be frozen, most likely here.
        if not self._clock.advance_to(claimed.now):
            self._clock.set_to(self._queue.lease.now())
        if claimed.claims and claimed.paused:
            self._hand_back()
        elif claimed.claims:
            self._hold(self._wait_for_more(claimed.claims, limit))

    def _hand_back(self) -> None:
        """Gives back jobs that were delivered while the service was paused, without charging an attempt."""
        self._queue.lease.release(self._consumer, only=self._gathered)
        self._window.forget(self._gathered)
        self._gathered.clear()

    def _claim_more(self, limit: ClaimBudget) -> list[Claim]:
        """Claims besides the gathered jobs, which are not in the window yet."""
        room = self._room()
        if room is None:
            return []
        before = self._last_claim
        claims = self._claim(room._replace(streams=limit.streams, returned=limit.returned)).claims
        self._last_claim = self._last_claim._replace(takes=before.takes, found=True, asleep=before.asleep)
        return claims

    def _claim(self, limit: ClaimBudget) -> Claimed:
        takes = self._window.takes
        claimed = self._queue.streams.claim(self._consumer, self._saving(limit))
        self._clock.set_to(claimed.now)
        self._note(claimed)
        self._last_claim = self._last_claim.then(claimed, limit, takes)
        return claimed

    def _note(self, claimed: Claimed) -> None:
        in_window = map(self._window.waiting_of, PRIORITIES)
        self._fair_share.record(claimed.claims, [sum(each) for each in zip(claimed.waiting, in_window, strict=True)])
        self._gather(claimed.claims)
        if claimed.claims and (job := claimed.claims[-1].job):
            self._last_job = (job.rows, job.tokens)

    def _saved(self) -> list[tuple[Priority, int]]:
        return list(zip(CLASSES, self._fair_share.saved(), strict=True))

    def _saving(self, limit: ClaimBudget) -> ClaimBudget:
        """`limit` with the saved rows of each class. Its rows that wait here spend them first."""
        if not any(self._fair_share.saved()):
            return limit
        normal, batch = (self._spend_share(*each) for each in self._saved())
        return limit._replace(saved=(normal, batch))

    def _spend_share(self, priority: Priority, saved: int) -> int:
        if not self._window.waiting_of(priority):
            return saved
        self._fair_share.charge(priority, self._window.spend_share(priority, saved))
        return 0

    def _gather(self, claims: Sequence[Claim]) -> None:
        """Notes entries as held until their rows are in the window. A beat would report them as unknown otherwise."""
        names = [claim.address.name for claim in claims]
        suspects = [claim.address.name for claim in claims if claim.attempts >= SUSPECT_ATTEMPTS]
        self._window.keep(names, suspects)
        self._gathered += names

    def _wait_for_more(self, gathered: list[Claim], limit: ClaimBudget) -> list[Claim]:
        """Waits for more jobs while the model is idle and they are likely; at most batch_timeout from the first job."""
        self._observe(len(gathered))
        # The shortest batch_timeout applies to all.
        self._batch_delay.batch_timeout_s = min(self._batch_timeouts[claim.address.priority] for claim in gathered)
        first = last = time.monotonic()
        while self._window.idle and sum(_rows(claim) for claim in gathered) < self._window.budget.rows:
            since = time.monotonic()
            wait_s = self._batch_delay.wait_s(since - first, since - last)
            # A wait saves at most a forward: not worth it if a forward is shorter than the shortest wait.
            if not wait_s or self._window.cost.smallest_s < LEAST_WAIT_S or self._shutdown.draining:
                break
            # No blocking read: an idle server ends it up to 100 ms late (its timer runs 10 times a second).
            self._shutdown.pause(max(LEAST_WAIT_S, wait_s / 4))
            more = self._claim_more(limit)
            self._batch_delay.observe(len(more), time.monotonic() - since)
            gathered += more
            last = time.monotonic() if more else last
        if last == first and time.monotonic() - first > LEAST_WAIT_S:
            self._batch_delay.note_failed_wait()
        return gathered

    def _observe(self, arrived: int) -> None:
        """Reports the jobs that arrived while others waited or ran. The first job after an idle time does not count."""
        busy_s = self._window.busy_s()
        alone = self._window.idle
        self._batch_delay.observe(arrived - alone, busy_s - self._busy_s)
        self._busy_s = busy_s

    def _records(self, claims: Sequence[Claim]) -> Mapping[str, bytes]:
        """Output of earlier runs of these jobs, by name. Read after the claim, when nobody else can add to it."""
        begun = [claim.address for claim in claims if claim.given_back and claim.address.streams]
        if not begun:
            return {}
        records = self._queue.streams.partials([address.job_id for address in begun])
        return {address.name: blob for address, blob in zip(begun, records, strict=True) if blob}

    def _hold(self, claims: list[Claim]) -> None:
        records = self._records(claims) if self._intake.resumes else NO_RECORDS
        # None is the usual case, kept fast: the process has one lane.
        if self._stage is None:
            self._admit(claims, records)
            return
        with self._stage(self._window.has_suspect(self._gathered)):
            self._admit(claims, records)

    def _admit(self, claims: list[Claim], records: Mapping[str, bytes]) -> None:
        jobs, finished = self._intake.admit(claims, self._clock.now(), records)
        now = self._clock.now()
        for job in jobs:
            job.prepared_at = now
        for each in finished:
            self._finish(each)
        for job in self._window.hold(jobs):
            self._finish(cancelled(job))
        self._intake.end_admission()
        self._gathered.clear()


def _rows(claim: Claim) -> int:
    return claim.job.rows if claim.job else 1
