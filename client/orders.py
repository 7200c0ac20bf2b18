"""What a process asks its channel for: jobs to be accepted together, or not to run any more; and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from millstream.broker.errors import BrokerUnavailable, MillstreamError
from millstream.broker.streams import CancelOutcome, Group

AWAY_PAUSE_S = 0.1
"""Between two tries while the server is away."""


class Sink(Protocol):
    """Who waits for jobs. Called from the channel's threads: must be quick and raise nothing."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None: ...


class Submission(NamedTuple):
    """Jobs to be accepted together. Refusals are waited out until `until` (monotonic seconds; None: for ever)."""

    service: str
    group: Group
    sink: Sink
    until: float | None

    @property
    def job_ids(self) -> list[str]:
        return [draft.id for draft in self.group.drafts]

    @property
    def jobs(self) -> int:
        return len(self.group.drafts)

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum([len(draft.body) for draft in self.group.drafts])


@dataclass(frozen=True, slots=True, eq=False)
class Cancellation:
    """Jobs nobody wants any more. `told` gets one outcome a job, or the error that kept us from asking."""

    service: str
    job_ids: Sequence[str]
    told: Callable[[Sequence[CancelOutcome] | MillstreamError], None]

    @property
    def jobs(self) -> int:
        return len(self.job_ids)

    @property
    def size(self) -> int:
        return 0


def client_closed() -> BrokerUnavailable:
    return BrokerUnavailable("this client is closed", hint="make a new one")
