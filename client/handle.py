"""Handle of a submitted call: waiting, results, cancellation."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from millstream.broker.contract.errors import BrokerUnavailable, DeadlineExceeded, MillstreamError
from millstream.broker.contract.job import Json
from millstream.broker.queue.stream_types import CancelOutcome
from millstream.client.channel.wake_chain import wake_chain
from millstream.client.job_terms import seconds_of, waits_until
from millstream.client.result import Embeddings, name_version
from millstream.client.row_results import RowOutcome, RowResults
from millstream.client.transfer import Transfer

CANCEL_S = 5.0
"""Seconds that `cancel` waits at most for the server's answer."""

ABANDON_S = 1.0
"""Seconds that `cancel` waits after an interrupt: the process may be ending, and Ctrl-C must not seem to hang."""

RECHECK_S = 2.0
"""Seconds that a thread sleeps at most before it checks the rows itself: an interrupt may have lost its wake-up."""


class Cancelling:
    """Cancellation of a call in progress. `notify` is called when the server has answered, from another thread.

    `asked` is True if the server was asked. `untouched` is True if no row had an outcome before.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.asked = self.untouched = False
        self._notify = notify
        self._outcomes: Sequence[CancelOutcome] | MillstreamError | None = None

    def receive(self, outcomes: Sequence[CancelOutcome] | MillstreamError) -> None:
        """Takes the server's answer. Called by the channel."""
        self._outcomes = outcomes
        self._notify()

    def result(self) -> bool:
        """Returns or raises what Handle.cancel does, from the answers received so far."""
        if self.asked and self._outcomes is None:
            raise DeadlineExceeded("the server did not answer the cancellation in time")
        if isinstance(self._outcomes, MillstreamError):
            raise self._outcomes
        return self.untouched and all(outcome == "waiting" for outcome in self._outcomes or ())


class Handle:
    """Submitted call. Its methods may be called from any thread and any number of times."""

    def __init__(self, transfer: Transfer, owner: object = None) -> None:
        """Sends the jobs of `transfer`."""
        self._pid = os.getpid()
        # This reference keeps the client alive: an unreferenced client closes itself, and would end this call.
        self._owner = owner
        self._growing = transfer.growing
        self._transfer = transfer
        self._lock = transfer.lock
        try:
            transfer.pump()
        except BaseException:
            # After an interrupt the caller never gets this handle.
            self.cancel_soon()
            raise

    @property
    def id(self) -> str:
        """Id of the call, which is the id of its first job. It changes if the call falls back to another version."""
        return self._transfer.id

    @property
    def service(self) -> str:
        """Name of the service that runs the call."""
        return self._transfer.service

    @property
    def version(self) -> str:
        """Version of the service's route that runs the call; "" without a route."""
        return self._transfer.version

    @property
    def _rows(self) -> RowResults:
        # Others after a fallback.
        return self._transfer.rows

    @property
    def ready(self) -> bool:
        """Whether every row has its outcome. Does not check the call's deadline: only `wait` and `expire` do."""
        self._check_process()
        with self._lock:
            return self._rows.missing <= 0

    @property
    def rows_done(self) -> int:
        """Number of rows that have their outcome, for a progress bar."""
        self._check_process()
        with self._lock:
            return len(self._rows) - self._rows.missing

    def done(self) -> bool:
        """Returns whether `result` would return or raise at once."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for at most `timeout` seconds until every row has its outcome. Returns whether they all have."""
        until = waits_until(timeout)
        self._check_process()
        with self._lock:
            while self._rows.missing > 0:
                if not self._sleep_until(until):
                    return False
            return True

    def wait_for_text(self) -> None:
        """Waits until there is text to take or a gap to fill, or the call is over."""
        self._check_process()
        with self._lock:
            while self._rows.missing > 0 and not self.has_text:
                self._sleep_until(None)

    @property
    def has_text(self) -> bool:
        """Whether there is text to take or a gap to fill."""
        return self._growing is not None and self._growing.has_news

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """Waits for at most `timeout` seconds and returns the results in the order of the inputs.

        Raises DeadlineExceeded if this wait was too short (the call goes on), or the call's own error: PartialFailure
        if some rows failed, with the results of the others; the error of the first row if all failed with the same
        type.
        """
        self._wait_or_raise(timeout)
        with self._lock:
            value = self._rows.value((self._transfer.ended - self._transfer.began) * 1000)
            return name_version(value, self._transfer.version)

    def outcomes(self, timeout: float | None = None) -> list[RowOutcome]:
        """Waits as `result` does, and returns each row's result or error as a value.

        Raises DeadlineExceeded if this wait was too short.
        """
        self._wait_or_raise(timeout)
        with self._lock:
            return self._rows.outcomes()

    def finish(self) -> Embeddings | list[Json]:
        """Does as `result`, without a limit. An interrupt of this thread, such as Ctrl-C, cancels the call."""
        try:
            return self.result()
        except MillstreamError:
            raise
        except BaseException:
            with suppress(MillstreamError):
                self.cancel(ABANDON_S)
            raise

    def cancel(self, timeout: float = CANCEL_S) -> bool:
        """Cancels the call; `result` then raises Cancelled. Returns True if no worker had claimed any of its jobs.

        Returns False, too, if the call was over. A job that runs is stopped at its worker's next heartbeat, within
        about a second. Raises BrokerUnavailable, or DeadlineExceeded if the server does not answer within `timeout`
        seconds.
        """
        limit, reported = seconds_of(timeout), threading.Event()
        cancelling = self.begin_cancel(reported.set)
        if cancelling.asked:
            reported.wait(None if limit is None else min(limit, threading.TIMEOUT_MAX))
        return cancelling.result()

    def begin_cancel(self, notify: Callable[[], None]) -> Cancelling:
        """Cancels without waiting. `notify` is called, from another thread, when the server has answered."""
        self._check_process()
        cancelling = Cancelling(notify)
        with self._lock:
            cancelling.untouched = self._transfer.untouched
            cancelling.asked = self._transfer.drop(cancelling.receive)
        return cancelling

    def cancel_soon(self) -> None:
        """Cancels without waiting for the server. Does nothing if the call is over."""
        # In a forked child the call still belongs to the parent. A closed client has no calls.
        if os.getpid() == self._pid:
            with suppress(BrokerUnavailable):
                self._transfer.drop(lambda outcomes: None)

    @property
    def expires_at(self) -> float | None:
        """Time at which to call `expire`, monotonic seconds; None if the call has no limit or is over."""
        self._check_process()
        with self._lock:
            return self._transfer.expires_at() if self._rows.missing > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until `expires_at`, at least 0; None if the call has no limit or is over."""
        return _soonest(time.monotonic(), self.expires_at)

    def expire(self) -> None:
        """Ends the call if its deadline is over. Does not block: listeners are called when rows get their errors."""
        with self._lock:
            now, end = time.monotonic(), self.expires_at
            if end is not None and now >= end:
                self._transfer.expire(now)

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever rows get their outcome, until `unlisten`: in any thread, so it must be quick."""
        # Without the lock: a forked child may call `unlisten`, and a thread of its parent may have held the lock.
        self._transfer.listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Removes `listener`. Does nothing if it was not added, for instance because of an interrupt."""
        if listener in self._transfer.listeners:
            self._transfer.listeners.remove(listener)

    # -- under the lock ----------------------------------------------------------------------------------------

    def _sleep_until(self, until: float | None) -> bool:
        """Sleeps once, or ends the call if its deadline is over. Returns False if it is `until` or later."""
        now, end = time.monotonic(), self._transfer.expires_at()
        if end is not None and now >= end:
            self._transfer.expire(now)
        elif until is not None and now >= until:
            return False
        else:
            self._sleep(_soonest(now, until, end))
        return True

    def _sleep(self, timeout: float | None) -> None:
        """Sleeps, without the lock, until rows get their outcome; at most `timeout` seconds, and at most RECHECK_S."""
        # Costs a sixth of threading.Condition, and every blocking call sleeps here.
        waiter = threading.Lock()
        waiter.acquire()
        self._transfer.waiters.append(waiter)
        self._lock.release()
        try:
            waiter.acquire(timeout=RECHECK_S if timeout is None else min(timeout, RECHECK_S))
        finally:
            self._lock.acquire()
            if waiter in self._transfer.waiters:
                self._transfer.waiters.remove(waiter)
            wake_chain.leave(waiter)

    # ----------------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        """Raises BrokerUnavailable in a forked child.

        Called before a lock is acquired: a thread of the parent may have held it when this process was forked.
        """
        if os.getpid() != self._pid:
            raise BrokerUnavailable(
                "this call was made before a fork, in the parent process", hint="make it again here"
            )

    def _wait_or_raise(self, timeout: float | None) -> None:
        if not self.wait(timeout):
            raise DeadlineExceeded(f"no result within {timeout} s of waiting", phase="total")


def _soonest(now: float, *moments: float | None) -> float | None:
    """Returns the seconds from `now` to the earliest of `moments`; None if there is none."""
    first = None
    for moment in moments:
        if moment is not None and (first is None or moment < first):
            first = moment
    return None if first is None else max(0.0, first - now)
