"""Submissions: jobs to be accepted together, and the sink for their outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.queue.stream_types import Group


class Sink(Protocol):
    """Receives the outcomes of jobs. The threads that send and read call it, so it must not block."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def emitted(self, job_id: str, delta: bytes) -> None:
        """Takes an encoded delta of a running job's text. The same delta can come twice, and deltas can be missing."""

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None: ...


class Submission(NamedTuple):
    """Jobs to be accepted together.

    Refused jobs are sent again until `until`, monotonic seconds: None means for ever, 0.0 never. `tenant` is set if
    each tenant has its own limits. `accepted` is called once the server has the jobs.
    """

    service: str
    group: Group
    sink: Sink
    until: float | None
    tenant: str = ""
    accepted: Callable[[], None] | None = None

    @property
    def job_ids(self) -> list[str]:
        return [draft.id for draft in self.group.drafts]

    @property
    def jobs(self) -> int:
        return len(self.group.drafts)

    @property
    def size(self) -> int:
        """Bytes of all bodies."""
        drafts = self.group.drafts
        return len(drafts[0].body) if len(drafts) == 1 else sum([len(draft.body) for draft in drafts])
