"""One call under way: the jobs that carry its rows, and what came back."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from millstream.broker.cache import Cached
from millstream.broker.codec import decode_reply, encode_inputs
from millstream.broker.errors import (
    BrokerUnavailable,
    Cancelled,
    DeadlineExceeded,
    Malformed,
    MillstreamError,
    ModelFailed,
)
from millstream.broker.job import Draft, Json, Priority, Reply
from millstream.broker.streams import CancelOutcome, Group
from millstream.client.baton import baton
from millstream.client.channel import Channel
from millstream.client.flights import Flights
from millstream.client.ids import new_id
from millstream.client.orders import Cancellation, Submission
from millstream.client.result import Embeddings
from millstream.client.rows import RowOutcome, Rows
from millstream.client.split import Part

CANCEL_S = 5.0

RECHECK_S = 2.0
"""How long a thread sleeps at most before it looks for itself: an interrupt may have cost it its wake-up."""


class Terms(NamedTuple):
    """How a call is to be run. Times in seconds; None is no limit.

    `timeout` bounds the whole call. Without it each job has `total_timeout` from the moment it is sent, so that a call
    of any length ends only when its progress does. `window` is how many jobs may be under way at once.
    """

    service: str
    op: str
    priority: Priority
    options: Mapping[str, Json]
    timeout: float | None
    total_timeout: float | None
    queue_timeout: float | None
    wait: bool
    window: int
    tenant: str = ""
    replicated: bool = False


class _Sent(NamedTuple):
    """A job under way, and when to give it up (monotonic seconds)."""

    part: Part
    end: float | None


class Handle:
    """A submitted call. Its methods may be called from any thread, again and again."""

    def __init__(
        self,
        channel: Channel | Flights,
        terms: Terms,
        inputs: Sequence[Json],
        parts: Sequence[Part],
        given: Mapping[int, MillstreamError | Cached],
        why_late: Callable[[str], MillstreamError],
    ) -> None:
        self.id = self._first_id = new_id()
        self._channel = channel
        self._terms = terms
        self._inputs = inputs
        self._why_late = why_late
        self._lock = threading.RLock()
        self._waiters: list[threading.Lock] = []
        self._listeners: list[Callable[[], None]] = []
        self._unsent = deque(parts)
        self._sent: dict[str, _Sent] = {}
        self._patient = terms.wait
        self._rows = Rows(len(inputs), given, terms.op)
        self._sendable = self._rows.left
        self._pid = os.getpid()
        self._began = time.monotonic()
        self._ended = self._began
        self._end = None if terms.timeout is None else self._began + terms.timeout
        self._pump()

    @property
    def ready(self) -> bool:
        """Whether every row has its outcome. Asks nobody: a call whose time is over is not ready until waited for."""
        self._check_process()
        with self._lock:
            return not self._rows.left

    @property
    def rows_done(self) -> int:
        """Rows that have their outcome, for a progress bar."""
        self._check_process()
        with self._lock:
            return len(self._rows) - self._rows.left

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for at most `timeout` seconds until every row has its outcome; whether they have."""
        until = None if timeout is None else time.monotonic() + timeout
        self._check_process()
        with self._lock:
            while self._rows.left:
                now, end = time.monotonic(), self._expires_at()
                if end is not None and now >= end:
                    self._give_up([job for job, sent in self._sent.items() if sent.end is not None and now >= sent.end])
                elif until is not None and now >= until:
                    return False
                else:
                    self._change(_soonest(now, until, end))
            return True

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """The results in the order of the inputs, waiting for at most `timeout` seconds.

        Raises DeadlineExceeded where this wait was too short (the call goes on), or the call's own error:
        PartialFailure where some rows failed, with the others' results; the rows' error where all failed alike.
        """
        self._wait_or_raise(timeout)
        with self._lock:
            return self._rows.value((self._ended - self._began) * 1000)

    def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Each row's result or error, as values. Raises DeadlineExceeded where this wait was too short."""
        self._wait_or_raise(timeout)
        with self._lock:
            return self._rows.outcomes()

    def cancel(self) -> bool:
        """Stop the call; `result` then raises Cancelled. True where none of its jobs had been taken by a worker.

        A job that runs ends at its worker's next beat, within about a second. False too where the call was over. Raises
        BrokerUnavailable, or DeadlineExceeded where the server's word takes too long.
        """
        self._check_process()
        told: SimpleQueue[Sequence[CancelOutcome] | MillstreamError] = SimpleQueue()
        with self._lock:
            untouched = 0 < self._rows.left == self._sendable
            asked = self._drop(told.put)
        if not asked:
            return untouched
        try:
            outcomes = told.get(timeout=CANCEL_S)
        except Empty:
            raise DeadlineExceeded(f"no word on the cancellation within {CANCEL_S:g} s") from None
        if isinstance(outcomes, MillstreamError):
            raise outcomes
        return untouched and all(outcome == "waiting" for outcome in outcomes)

    def cancel_soon(self) -> None:
        """The same without waiting for the server's word. Does nothing where there is nothing to cancel any more."""
        # An inherited call is its parent's; a closed client has no calls.
        if os.getpid() == self._pid:
            with suppress(BrokerUnavailable):
                self._drop(lambda outcomes: None)

    @property
    def expires_at(self) -> float | None:
        """When the next job's time is over, monotonic seconds; None where there is no limit, or nothing under way."""
        self._check_process()
        with self._lock:
            return self._expires_at()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever rows get their outcome, until `unlisten`: from any thread, so it must be quick."""
        # Without the lock: a forked child may end this, too.
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Does nothing where it does not listen: an interrupt may have come before."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    # -- the channel's side ------------------------------------------------------------------------------------

    def answered(self, job_id: str, reply: bytes) -> None:
        """A job's reply came. Called by the channel."""
        outcome: Reply | MillstreamError
        try:
            outcome = decode_reply(reply)
        except Malformed as error:
            outcome = ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")
        with self._lock:
            sent = self._sent.pop(job_id, None)
            if sent:
                self._place([sent.part], outcome)
        if self._unsent:
            self._pump()

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        """Jobs were not accepted, or nobody listens for their answers any more. Called by the channel."""
        with self._lock:
            sent = [self._sent.pop(job_id) for job_id in job_ids if job_id in self._sent]
            self._place([each.part for each in sent] + self._take_unsent(), error)

    def _pump(self) -> None:
        """Send what the window has room for."""
        # The channel's turn too is under the lock: a cancellation must not overtake what it cancels.
        with self._lock:
            drafts = []
            while self._unsent and len(self._sent) < self._terms.window:
                drafts.append(self._draft(self._unsent.popleft()))
            if not drafts:
                return
            submissions = self._submissions(drafts)
            self._patient = True
            try:
                self._channel.submit(submissions)
            except MillstreamError as error:
                self.refused([draft.id for draft in drafts], error)

    def _submissions(self, drafts: Sequence[Draft]) -> list[Submission]:
        """One a job, each waiting out refusals by itself; without patience one for all, accepted whole or not."""
        service = self._terms.service
        if not self._patient:
            return [Submission(service, self._group(drafts, calls=1), self, until=0.0)]
        # The call is charged with its first job, which has the call's id.
        return [
            Submission(service, self._group([draft], int(draft.id == self.id)), self, draft.deadline)
            for draft in drafts
        ]

    def _group(self, drafts: Sequence[Draft], calls: int) -> Group:
        return Group(self._terms.priority, drafts, calls, self._terms.replicated)

    def _draft(self, part: Part) -> Draft:
        terms, now = self._terms, time.monotonic()
        own_end = None if terms.total_timeout is None else now + terms.total_timeout
        end = self._end if self._end is not None else own_end
        body = encode_inputs([self._inputs[row] for row in part.rows], terms.options)
        queue_by = None if terms.queue_timeout is None else now + terms.queue_timeout
        job_id, client = self._first_id or new_id(), self._channel.client_id
        draft = Draft(job_id, terms.op, len(part.rows), part.tokens, body, client, end, queue_by, terms.tenant)
        self._first_id = ""
        self._sent[draft.id] = _Sent(part, end)
        return draft

    # -- under the lock ----------------------------------------------------------------------------------------

    def _place(self, parts: Sequence[Part], outcome: Reply | MillstreamError) -> None:
        for part in parts:
            self._rows.place(part, outcome)
        self._ended = time.monotonic()
        if self._waiters:
            # First: an interrupt must not leave them to be woken twice.
            waiters, self._waiters = self._waiters, []
            baton.wake(waiters)
        for listener in list(self._listeners):
            listener()

    def _change(self, timeout: float | None) -> None:
        """Sleep, without the lock, until rows got their outcome, or for `timeout` seconds, or RECHECK_S."""
        # What threading.Condition does, for a sixth of its price: every blocking call comes here.
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self._lock.release()
        try:
            waiter.acquire(timeout=RECHECK_S if timeout is None else min(timeout, RECHECK_S))
        finally:
            self._lock.acquire()
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            baton.left(waiter)

    def _take_unsent(self) -> list[Part]:
        """What was not sent yet has no better prospects than what was."""
        parts = list(self._unsent)
        self._unsent.clear()
        return parts

    def _expires_at(self) -> float | None:
        return min([sent.end for sent in self._sent.values() if sent.end is not None], default=None)

    def _give_up(self, overdue: Sequence[str]) -> None:
        parts = [self._sent.pop(job).part for job in overdue] + self._take_unsent()
        with suppress(BrokerUnavailable):
            # Nobody waits: off the queue, where dead work would keep others out.
            self._channel.cancel(Cancellation(self._terms.service, list(overdue), lambda outcomes: None))
        # What the interruption of this thread, too, leaves as the rows' outcome.
        error: MillstreamError = DeadlineExceeded("no answer in time")
        # Asking the server why takes a round trip: not under the lock, the channel's threads may want it.
        self._lock.release()
        try:
            error = self._why_late(self._terms.service)
        finally:
            self._lock.acquire()
            self._place(parts, error)

    # ----------------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        """Before any lock is taken: a thread of the parent may have held it when this process was forked."""
        if os.getpid() != self._pid:
            raise BrokerUnavailable(
                "this call was made before a fork, in the parent process", hint="make it again here"
            )

    def _wait_or_raise(self, timeout: float | None) -> None:
        if not self.wait(timeout):
            raise DeadlineExceeded(f"no result within {timeout:g} s of waiting", phase="total")

    def _drop(self, told: Callable[[Sequence[CancelOutcome] | MillstreamError], None]) -> bool:
        """Give every row that is not answered its Cancelled, and cancel what was sent; False where nothing was."""
        with self._lock:
            sent, self._sent = self._sent, {}
            parts = [each.part for each in sent.values()] + self._take_unsent()
            if parts:
                self._place(parts, Cancelled("cancelled by its caller"))
            if sent:
                self._channel.cancel(Cancellation(self._terms.service, list(sent), told))
            return bool(sent)


def _soonest(now: float, *moments: float | None) -> float | None:
    """Seconds from `now` to the first of `moments`; None where there is none."""
    given = [moment for moment in moments if moment is not None]
    return max(0.0, min(given) - now) if given else None
