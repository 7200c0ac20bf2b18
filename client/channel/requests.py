"""Cancellations, and the errors that the threads of a client share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.queue.stream_types import CancelOutcome

NO_THREAD = "raise the limit on threads of this user or container (ulimit -u, pids.max)"
"""Hint of the error that is raised if a thread of the client cannot start."""


@dataclass(frozen=True, slots=True, eq=False)
class Cancellation:
    """Jobs to cancel. `report` gets one outcome for each job, or the error if the server could not be asked.

    `call` is the id of the call if its jobs are detached, otherwise empty.
    """

    service: str
    job_ids: Sequence[str]
    report: Callable[[Sequence[CancelOutcome] | MillstreamError], None]
    call: str = ""

    @property
    def jobs(self) -> int:
        return len(self.job_ids)

    @property
    def size(self) -> int:
        return 0


def client_closed() -> BrokerUnavailable:
    """Returns the error of a request to a closed client."""
    return BrokerUnavailable("this client is closed", hint="make a new one")
