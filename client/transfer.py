"""Transfer of one call's jobs: sends a window of them at a time, and sends timed-out ones again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import (
    BrokerUnavailable,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Malformed,
    MillstreamError,
    ModelFailed,
    QueueFull,
    RateLimited,
    ServicePaused,
    described,
)
from millstream.broker.contract.job import Draft, Json, Reply
from millstream.broker.contract.operations import BY_OP, STREAMING_OPS
from millstream.broker.contract.partial import decode_delta
from millstream.broker.queue.cache import Cached
from millstream.broker.queue.stream_types import CancelOutcome
from millstream.client.attempt import Attempt, Fallback
from millstream.client.channel.requests import Cancellation
from millstream.client.channel.wake_chain import wake_chain
from millstream.client.fall_back import FIRST_SHARE, falls_back, impatient
from millstream.client.flow import Flow
from millstream.client.growing_text import GrowingText
from millstream.client.job_terms import CallChannel, JobTerms, Progress, Watch, new_job_id
from millstream.client.known import Known
from millstream.client.row_results import RowResults
from millstream.client.split import Part

EXPLAIN_S = 0.25
"""Seconds after its deadline that a call waits at most to learn from the server why it is late."""


WATCH_S = 2.0
"""Seconds between two looks of a call with a fallback whether a worker of its service lives."""

CONCLUDE_S = 0.5
"""Seconds after its deadline that a call waits for a text that has begun: a worker ends the text at the deadline, and
its reply has the text so far. It covers a step of the model and the way of the reply."""


class _SentJob(NamedTuple):
    """Job in flight, which was sent at `at`, monotonic seconds. `emitted`: a part of its text has arrived."""

    part: Part
    at: float
    emitted: bool = False


class Transfer:
    """Sends one call's jobs and is their sink. Wakes `waiters` and calls `listeners` when rows get an outcome.

    `growing` gets the text of a call of one job, if its operation streams; waiters are woken for each piece, too. If a
    call has a `fallback`, it starts again there when a job fails: `id`, `service`, `version` and `rows` then change.
    """

    def __init__(
        self,
        channel: CallChannel,
        watch: Watch,
        terms: JobTerms,
        inputs: Sequence[Json],
        parts: Sequence[Part],
        given: Mapping[int, MillstreamError | Cached],
        began: float | None = None,
        progress: Progress | None = None,
        growing: GrowingText | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        """Prepares the jobs. `began`: monotonic seconds, None is now. `progress`: that of the call's map."""
        began = time.monotonic() if began is None else began
        progress = progress or Progress(began)
        self.lock = threading.RLock()
        self.began = self.ended = began
        self._watch = watch
        # A copy, because the caller may change its list later.
        self._inputs = list(inputs)
        self._in_flight: dict[str, _SentJob] = {}
        self._progress = progress
        self.growing = growing
        self._fallback, self._waits, self._text_began = fallback, terms.wait, False
        self._set_up(Attempt(channel, impatient(terms) if fallback else terms, parts, given))
        # The start of a call counts as progress: a map starts its later calls long after its first.
        progress.at = max(progress.at, began)
        self._looked_at = self._watched_at = began
        self._explain_by: float | None = None
        self.waiters: list[threading.Lock] = []
        self.listeners: list[Callable[[], None]] = []

    def _set_up(self, attempt: Attempt) -> None:
        """Prepares the jobs of an attempt, with no outcome of an earlier one."""
        terms = attempt.terms
        self.id = self._first_id = self._charged_with = new_job_id()
        self.rows = RowResults(len(self._inputs), attempt.given, BY_OP[terms.op].results)
        self._channel, self._terms, self.service = attempt.channel, terms, terms.service
        self._unsent = deque(attempt.parts)
        self._sendable = self.rows.missing
        self._end = None if terms.timeout is None else self.began + terms.timeout
        self._begin_by: float | None = None
        if self._fallback and terms.timeout is not None:
            half = self.began + terms.timeout * FIRST_SHARE
            # A worker cuts a text at its deadline, so a text has all of the time once it has begun.
            if terms.op in STREAMING_OPS:
                self._begin_by = half
            else:
                self._end = half
        # None until the call needs a window: most calls have only one job.
        self._flow: Flow | None = None

    @property
    def version(self) -> str:
        """Version of the call's route that runs it; "" without a route."""
        return self._terms.version

    @property
    def untouched(self) -> bool:
        """Whether rows were sent and none has an outcome yet."""
        return 0 < self.rows.missing == self._sendable

    # -- sending -----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Sends as many jobs as the window has room for."""
        # Submits under the lock: the cancellation of a job must not reach the channel before the job.
        with self.lock:
            drafts: list[Draft] = []
            window = self._window() if len(self._unsent) + len(self._in_flight) > 1 else 1
            while self._unsent and len(self._in_flight) < window:
                if draft := self._draft(self._unsent.popleft()):
                    drafts.append(draft)
            if not drafts:
                return
            try:
                self._channel.submit(self._terms.submissions(drafts, self, self._charged_with))
            except MillstreamError as error:
                self.refused([draft.id for draft in drafts], error)

    def _window(self) -> int:
        if self._flow is None:
            terms = self._terms
            answer_within_s = terms.total_timeout if terms.timeout is None else None
            self._flow = Flow(terms.most_jobs, answer_within_s, self.began, terms.at_once)
        return self._flow.window(self._watch.live(self._terms.service, self.pump))

    def _draft(self, part: Part) -> Draft | None:
        """Returns the job that carries `part`. If it cannot be encoded, its rows get the error and None is returned."""
        job_id, now = self._first_id or new_job_id(), time.monotonic()
        rows = list(map(self._inputs.__getitem__, part.rows))
        try:
            draft = self._terms.draft(job_id, rows, part.tokens, self._channel.client_id, self._end, now)
        except (TypeError, ValueError, RecursionError) as error:
            self._place([part], InvalidRequest(f"cannot be sent: {described(error)}"))
            return None
        # The call is charged with its first job; if that one was never accepted, with the next one.
        self._charged_with = self._charged_with or job_id
        self._first_id = ""
        self._in_flight[job_id] = _SentJob(part, now)
        return draft

    # -- the channel's side ------------------------------------------------------------------------------------

    def answered(self, job_id: str, reply: bytes) -> None:
        """Stores a job's reply and sends the next jobs. Called by the channel."""
        outcome: Reply | MillstreamError
        try:
            outcome = decode_reply(reply)
        except Malformed as error:
            outcome = ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")
        with self.lock:
            if job := self._in_flight.pop(job_id, None):
                self._settle(job, outcome)
        if self._unsent:
            self.pump()

    def emitted(self, job_id: str, delta: bytes) -> None:
        """Takes a delta of a job's text, which is progress. Called by the channel. Raises Malformed."""
        with self.lock:
            if job := self._in_flight.get(job_id):
                if not job.emitted:
                    self._in_flight[job_id] = job._replace(emitted=True)
                self._progress.at, self._text_began = time.monotonic(), True
                if self.growing is not None and self.growing.add(decode_delta(delta)):
                    self._tell()

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        """Ends jobs that were not accepted, or whose answers can no longer be read; sends them again if allowed.

        Called by the channel.
        """
        with self.lock:
            jobs = [self._in_flight.pop(job_id) for job_id in job_ids if job_id in self._in_flight]
            if self._waits and not self._terms.wait and isinstance(error, RateLimited):
                # Its caller waits, and no other version is a way around a rate limit.
                self._terms, again = self._terms._replace(wait=True), jobs
            else:
                again = [each for each in jobs if self._may_run_again(each, error)]
            lost = [each.part for each in jobs if each not in again]
            if lost and self._starts_again(error):
                lost, again = [], []
            self._unsent.extendleft(each.part for each in again)
            if self._charged_with in job_ids:
                self._charged_with = ""
                # The call was to be charged with this job. Without the charge its other jobs must not run.
                lost += self._take_in_flight() if lost else []
            if lost and not isinstance(error, DeadlineExceeded):
                # Unsent jobs would fail for the same reason, so they get the same outcome.
                lost += self._take_unsent()
            self._place(lost, error)
        if self._unsent:
            self.pump()

    def _settle(self, job: _SentJob, outcome: Reply | MillstreamError) -> None:
        error = outcome.error if isinstance(outcome, Reply) else None
        if error is not None and self._may_run_again(job, error):
            self._unsent.appendleft(job.part)
            return
        if self._starts_again(outcome):
            return
        if not isinstance(error, DeadlineExceeded):
            self._progress.at = time.monotonic()
            if self._unsent and self._flow:
                self._flow.answered(self._progress.at)
        self._place([job.part], outcome)

    def _may_run_again(self, job: _SentJob, error: MillstreamError) -> bool:
        """Returns whether a job that was late or refused is sent again: other jobs were answered since it was sent.

        A job whose text has begun is not: another run may generate another text.
        """
        if self._end is not None or self._progress.at <= job.at or job.emitted:
            return False
        if isinstance(error, DeadlineExceeded):
            return error.phase != "inference"
        return self._terms.wait and isinstance(error, QueueFull | RateLimited | ServicePaused)

    def _starts_again(self, outcome: Reply | MillstreamError) -> bool:
        """Starts the whole call again on its fallback, if it has one and `outcome` is a reason. Returns whether it did.

        The caller then calls `pump`. Results of the first version are thrown away: no answer mixes versions. A text
        of which the caller may have been given a part is not generated again.
        """
        fallback = self._fallback
        if fallback is None or (self.growing is not None and self._text_began) or not falls_back(outcome):
            return False
        self._take_in_flight()
        self._fallback, self._progress.at = None, time.monotonic()
        self._set_up(fallback(self._inputs))
        return True

    def _place(self, parts: Sequence[Part], outcome: Reply | MillstreamError) -> None:
        if parts:
            for part in parts:
                self.rows.place(part, outcome)
            self.ended = time.monotonic()
            self._tell()

    def _tell(self) -> None:
        if self.waiters:
            # Emptied before the wake-up: after an interrupt no waiter may be woken twice.
            waiters, self.waiters = self.waiters, []
            wake_chain.wake(waiters)
        for listener in list(self.listeners):
            listener()

    def _take_in_flight(self) -> list[Part]:
        """Cancels all jobs in flight and returns their parts."""
        jobs, self._in_flight = self._in_flight, {}
        if jobs:
            with suppress(BrokerUnavailable):
                self._channel.cancel(Cancellation(self._terms.service, list(jobs), lambda outcomes: None))
        return [each.part for each in jobs.values()]

    def _take_unsent(self) -> list[Part]:
        parts = list(self._unsent)
        self._unsent.clear()
        return parts

    # -- the deadline ------------------------------------------------------------------------------------------

    def expires_at(self) -> float | None:
        """Returns when to call `expire`, monotonic seconds; None if the call has no limit.

        While the server is being asked about the service, it is the end of that wait. A call with a fallback asks every
        WATCH_S whether a worker lives.
        """
        if self._explain_by is not None:
            return self._explain_by
        end = self._find_end()
        if self._fallback is None:
            return end
        watch = self._watched_at + WATCH_S
        if self._begin_by is not None and self._watched_at < self._begin_by:
            watch = min(watch, self._begin_by)
        return watch if end is None else min(end, watch)

    def _find_end(self) -> float | None:
        """Returns when the call is late, monotonic seconds; None if it has no limit."""
        if self._end is not None:
            return self._end + CONCLUDE_S if self._has_begun_text else self._end
        if self._terms.total_timeout is not None:
            return self._progress.at + self._terms.total_timeout
        if self._terms.idle_timeout is not None:
            return max(self._progress.at, self._looked_at) + self._terms.idle_timeout
        return None

    @property
    def _has_begun_text(self) -> bool:
        # Only a call of an operation that streams gets deltas.
        return self._terms.op in STREAMING_OPS and any(each.emitted for each in self._in_flight.values())

    def expire(self, now: float) -> None:
        """Asks the server, without waiting, why the call is late; ends the call if the answer takes over EXPLAIN_S."""
        if self._explain_by is None:
            self._explain_by = now + EXPLAIN_S
            self._watch.explain(self._terms.service, self._end_if_late)
        elif now >= self._explain_by:
            self._end_if_late(self._watch.last_known(self._terms.service))

    def _end_if_late(self, known: Known) -> None:
        """Ends the call if it is still late, with an error that depends on the state of its service."""
        with self.lock:
            if self._explain_by is None:
                return
            self._explain_by, now = None, time.monotonic()
            self._watched_at = now
            if self._should_leave(known, now) and self._starts_again(known.why_late()):
                self.pump()
                return
            end = self._find_end()
            if not self.rows.missing or end is None or now < end:
                return
            self._looked_at = now
            endless = self._end is None and self._terms.total_timeout is None
            if known.stuck or not endless:
                self._give_up(known)

    def _should_leave(self, known: Known, now: float) -> bool:
        """Returns whether a call with a fallback leaves its version: no worker lives, or its text has not begun."""
        is_late = self._begin_by is not None and now >= self._begin_by and not self._text_began
        return self.rows.missing > 0 and (known.has_no_workers or is_late)

    def _give_up(self, known: Known) -> None:
        """Gives each row its error: the last refusal if its job was not accepted yet, else why the service is late.

        If the call has a fallback, it starts again there.
        """
        if self._starts_again(known.why_late()):
            self.pump()
            return
        jobs, self._in_flight = self._in_flight, {}
        refusals = {job_id: self._channel.refusal_of(job_id) for job_id in jobs}
        with suppress(BrokerUnavailable):
            # No caller waits for these jobs any more: they must not take room in the queue.
            self._channel.cancel(Cancellation(self._terms.service, list(jobs), lambda outcomes: None))
        for job_id, each in jobs.items():
            self._place([each.part], refusals[job_id] or known.why_late(each.at))
        refusal = next((each for each in refusals.values() if each), None)
        self._place(self._take_unsent(), refusal or known.why_late())

    def drop(self, report: Callable[[Sequence[CancelOutcome] | MillstreamError], None]) -> bool:
        """Cancels the jobs in flight; rows without an outcome get Cancelled. Returns False if no job was in flight.

        `report` gets the outcomes of the cancellation. If it returns False, `report` is not called.
        """
        with self.lock:
            jobs, self._in_flight = self._in_flight, {}
            self._place(
                [each.part for each in jobs.values()] + self._take_unsent(), Cancelled("cancelled by its caller")
            )
            if jobs:
                self._channel.cancel(Cancellation(self._terms.service, list(jobs), report))
            return bool(jobs)
