"""Acceptance of a detached call: its jobs are submitted page by page, as the queue has room."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.contract.job import Draft
from millstream.broker.queue.submission import Submission

ROOM_S = 60.0
"""Seconds without an accepted job after which the call is given up."""

PAGE = 64
"""Jobs that are submitted together: the calls of other threads must not wait for all jobs of a large call."""

GRACE_S = 0.25
"""Seconds to wait for a refusal after the jobs' deadline. A server that answers takes less."""


class Outlet(Protocol):
    """Part of a channel that an Acceptance uses."""

    def submit_detached(self, submissions: Sequence[Submission]) -> None: ...

    def refusal_of(self, job_id: str) -> MillstreamError | None: ...


class Acceptance:
    """Sink of the jobs of one detached call, which submits them and waits until all are accepted. Thread-safe.

    `make_submission(draft, until, sink)` returns the submission of one job, which is given up at `until`. `deadline`
    is when the call ends. Both are monotonic seconds. `on_end` gets the refusal, or None when all are accepted.
    """

    def __init__(
        self,
        channel: Outlet,
        drafts: Sequence[Draft],
        make_submission: Callable[[Draft, float, Acceptance], Submission],
        deadline: float | None,
        on_end: Callable[[MillstreamError | None], object] = lambda error: None,
    ) -> None:
        self._on_end = on_end
        self._channel = channel
        self._make_submission = make_submission
        self._deadline = deadline
        self._drafts = {draft.id: draft for draft in drafts}
        self._unsubmitted = deque(drafts)
        self._pending: set[str] = set()
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._listener: Callable[[], None] = lambda: None
        self._last = time.monotonic()
        self._error: MillstreamError | None = None
        self._submit_more()

    @property
    def ends_at(self) -> float:
        """Time at which to stop waiting, monotonic seconds."""
        return self._until() + GRACE_S

    @property
    def over(self) -> bool:
        """Whether all jobs are accepted, or the call is given up: `check` then raises or returns."""
        return self._over.is_set() or time.monotonic() >= self.ends_at

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, from any thread, when the acceptance is over."""
        self._listener = listener
        if self._over.is_set():
            listener()

    def wait(self) -> None:
        """Blocks until every job is accepted.

        Raises the refusal of a job, or BrokerUnavailable if the server does not answer in time.
        """
        while not self.over:
            self._over.wait(max(0.0, self.ends_at - time.monotonic()))
        self.check()

    def check(self) -> None:
        """Raises as `wait` does. To be called when the acceptance is over."""
        if self._error:
            raise self._error
        if not self._over.is_set():
            waiting = next(iter(self._pending), "")
            raise self._channel.refusal_of(waiting) or BrokerUnavailable("the server did not accept the jobs in time")

    # -- the channel's side ------------------------------------------------------------------------------------

    def accepted(self, job_id: str) -> None:
        """Notes that the server has accepted this job, and submits the next page if it was the last of its page."""
        with self._lock:
            self._last = time.monotonic()
            self._pending.discard(job_id)
            self._drafts.pop(job_id, None)
            if not self._pending:
                self._submit_more()

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        """Submits these refused jobs again if the error allows it and there is time left; ends the call otherwise.

        Each acceptance of another job gives ROOM_S more, up to the deadline.
        """
        with self._lock:
            again = [self._drafts[job_id] for job_id in job_ids if job_id in self._pending]
            if error.retryable and time.monotonic() < self._until() and not self._over.is_set():
                self._submit(again)
            elif again:
                self._end(error)

    def answered(self, job_id: str, reply: bytes) -> None:
        """Does nothing, and is never called: the answers of detached jobs stay on the server."""

    def emitted(self, job_id: str, delta: bytes) -> None:
        """Does nothing, and is never called: the text of detached jobs stays on the server."""

    def _submit_more(self) -> None:
        page = [self._unsubmitted.popleft() for _ in range(min(PAGE, len(self._unsubmitted)))]
        if page:
            self._submit(page)
        else:
            self._end(None)

    def _submit(self, page: Sequence[Draft]) -> None:
        self._pending.update(draft.id for draft in page)
        until = self._until()
        try:
            self._channel.submit_detached([self._make_submission(draft, until, self) for draft in page])
        except MillstreamError as error:
            self._end(error)

    def _until(self) -> float:
        room = self._last + ROOM_S
        return room if self._deadline is None else min(room, self._deadline)

    def _end(self, error: MillstreamError | None) -> None:
        self._error = error
        self._over.set()
        self._on_end(error)
        self._listener()
