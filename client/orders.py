"""What a process asks its channel for beside submissions: jobs not to run any more, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millstream.broker.errors import BrokerUnavailable, MillstreamError
from millstream.broker.streams import CancelOutcome

NO_THREAD = "raise the limit on threads of this user or container (ulimit -u, pids.max)"
"""What to do if a thread of the client cannot start."""


@dataclass(frozen=True, slots=True, eq=False)
class Cancellation:
    """Jobs nobody wants any more. `told` gets one outcome a job, or the error that kept us from asking.

    `detached` jobs are those of no client.
    """

    service: str
    job_ids: Sequence[str]
    told: Callable[[Sequence[CancelOutcome] | MillstreamError], None]
    detached: bool = False

    @property
    def jobs(self) -> int:
        return len(self.job_ids)

    @property
    def size(self) -> int:
        return 0


def client_closed() -> BrokerUnavailable:
    return BrokerUnavailable("this client is closed", hint="make a new one")
