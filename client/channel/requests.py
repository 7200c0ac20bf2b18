"""What a process asks its channel for beside submissions: jobs not to run any more, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.queue.streams import CancelOutcome

NO_THREAD = "raise the limit on threads of this user or container (ulimit -u, pids.max)"
"""What to do if a thread of the client cannot start."""


@dataclass(frozen=True, slots=True, eq=False)
class Cancellation:
    """Jobs nobody wants any more. `report` gets one outcome a job, or the error that kept us from asking.

    Those of a detached call have its id as `call`.
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
    return BrokerUnavailable("this client is closed", hint="make a new one")
