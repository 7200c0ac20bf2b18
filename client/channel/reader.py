"""Reader thread: reads the replies of one service to this process and gives each to the call that waits for it.

A job whose text grows gets its deltas, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from millstream.broker.contract.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    MillstreamError,
    ModelFailed,
    described,
)
from millstream.broker.queue.replies import Replies
from millstream.broker.queue.submission import Sink, Submission
from millstream.broker.queue.submitter import AWAY_PAUSE_S
from millstream.broker.transport.connection import is_transient
from millstream.client.channel.requests import client_closed

log = logging.getLogger(__name__)

READ_S = 2.0
"""Seconds that one blocking read waits for replies at most."""

SWEEP_S = 10.0
"""Seconds between two sweeps of unanswered jobs, and seconds after a job's deadline until a sweep ends it."""

_NO_SINK: tuple[Sink | None, float | None] = (None, None)


class Reader(threading.Thread):
    """Thread that reads one service's replies while a call waits for one, and sleeps otherwise."""

    def __init__(self, service: str, replies: Replies) -> None:
        super().__init__(name=f"millstream-reader-{service}", daemon=True)
        self.strays = 0
        self._replies = replies
        self._waiting: dict[str, tuple[Sink, float | None]] = {}
        self._swept_at = time.monotonic()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False

    @property
    def awaited(self) -> int:
        """Number of jobs whose answers have not been read."""
        return len(self._waiting)

    def expect(self, submission: Submission) -> None:
        """Waits for the answers of these jobs from now on. Raises BrokerUnavailable if the reader is closed."""
        with self._lock:
            if self._closed:
                raise client_closed()
            asleep = not self._waiting
            for draft in submission.group.drafts:
                self._waiting[draft.id] = (submission.sink, draft.deadline)
            if asleep:
                self._changed.notify()

    def forget(self, job_ids: Sequence[str]) -> None:
        with self._lock:
            for job_id in job_ids:
                self._waiting.pop(job_id, None)

    def close(self) -> None:
        """Ends the thread. Calls that wait get BrokerUnavailable."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            waiting, self._waiting = self._waiting, {}
        for job_id, (sink, _) in waiting.items():
            # A new error for each: a raised error keeps its caller's frames alive.
            closed = BrokerUnavailable("this client was closed", hint="the job still runs, but its answer is dropped")
            _refuse(sink, job_id, closed)

    def run(self) -> None:
        while self._wait_for_work():
            self._step()

    def _step(self) -> None:
        # A function of its own: its local variables must not stay alive while the thread sleeps.
        try:
            answers = self._replies.read(READ_S)
        except Exception as error:  # noqa: BLE001 - callers still wait for the next replies, so the thread goes on
            self._pause(error)
            return
        waiting = self._waiting
        with self._lock:
            sinks = [
                (waiting.pop(job_id, _NO_SINK) if final else waiting.get(job_id, _NO_SINK))[0]
                for job_id, _, final in answers
            ]
        for sink, (job_id, data, final) in zip(sinks, answers, strict=True):
            if not sink:
                self.strays += final
            elif final:
                _answer(sink, job_id, data)
            else:
                _emit(sink, job_id, data)
        self._sweep()

    def _wait_for_work(self) -> bool:
        """Sleeps until a job waits for its answer; returns False if the reader is closed."""
        with self._lock:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return not self._closed

    def _sweep(self) -> None:
        """Ends jobs that have no answer SWEEP_S after their deadline, for instance if their caller dropped the call."""
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        with self._lock:
            over = [job for job, (_, end) in self._waiting.items() if end is not None and now > end + SWEEP_S]
            sinks = [self._waiting.pop(job_id)[0] for job_id in over]
        for job_id, sink in zip(over, sinks, strict=True):
            _refuse(sink, job_id, DeadlineExceeded("no answer in time"))

    def _pause(self, error: Exception) -> None:
        # While the reader is being closed, a read may fail with any error.
        if not self._closed and not is_transient(error):
            log.error("reading replies failed, trying again: %s", error)
        with self._lock:
            self._changed.wait_for(lambda: self._closed, AWAY_PAUSE_S)


def _answer(sink: Sink, job_id: str, reply: bytes) -> None:
    try:
        sink.answered(job_id, reply)
    except Exception as error:
        # One caller's error must not end the thread, which serves all others.
        log.exception("a reply could not be handed to its caller")
        _refuse(sink, job_id, ModelFailed(f"its reply cannot be used: {described(error)}"))


def _emit(sink: Sink, job_id: str, delta: bytes) -> None:
    try:
        sink.emitted(job_id, delta)
    except Exception:
        # The reply has the whole text.
        log.exception("a delta of a job's text could not be handed to its caller")


def _refuse(sink: Sink, job_id: str, error: MillstreamError) -> None:
    try:
        sink.refused([job_id], error)
    except Exception:
        log.exception("an error could not be handed to its caller")
