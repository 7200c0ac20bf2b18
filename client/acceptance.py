"""Waiting until the server has accepted jobs whose answers nobody here waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from millstream.broker.errors import BrokerUnavailable, MillstreamError

GRACE_S = 0.25
"""Seconds after their time within which the refusal of jobs is waited for: a server that answers is quicker."""


class Acceptance:
    """The jobs of one submission that are not accepted yet. Is their sink; `until` is monotonic seconds."""

    def __init__(self, job_ids: Sequence[str], until: float) -> None:
        self.job_ids = job_ids
        self.until = until
        self._left = set(job_ids)
        self._error: MillstreamError | None = None
        self._over = threading.Event()

    def accepted(self, job_id: str) -> None:
        """The server has this job. Called by the channel."""
        self._left.discard(job_id)
        if not self._left:
            self._over.set()

    def answered(self, job_id: str, reply: bytes) -> None:
        """Not called: the answers of detached jobs are kept on the server."""

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        """These jobs will not be sent again. Called by the channel."""
        self._error = error
        self._over.set()

    def wait(self, refusal_of: Callable[[str], MillstreamError | None]) -> None:
        """Block until every job is accepted, or one is refused. `refusal_of` says why a job still waits.

        Raises the refusal; BrokerUnavailable if the server says nothing in time.
        """
        self._over.wait(max(0.0, self.until - time.monotonic()) + GRACE_S)
        if self._error:
            raise self._error
        if left := next(iter(self._left), None):
            raise refusal_of(left) or BrokerUnavailable("the server did not accept the jobs in time")
