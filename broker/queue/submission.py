"""Submissions: jobs to be accepted together, the sink for their outcome, and the function that drafts a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Draft, Json
from millstream.broker.queue.stream_types import Group


class Sink(Protocol):
    """Receives the outcomes of jobs. The threads that send and read call it, so it must not block."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def emitted(self, job_id: str, delta: bytes) -> None:
        """Takes an encoded delta of a running job's text. The same delta can come twice, and deltas can be missing."""

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None: ...


def draft_job(
    job_id: str,
    op: str,
    inputs: Sequence[Json],
    tokens: int,
    options: Mapping[str, Json],
    client: str = "",
    deadline: float | None = None,
    queue_by: float | None = None,
    tenant: str = "",
) -> Draft:
    """Returns a job with one row for each of `inputs`. Raises TypeError or ValueError if JSON cannot represent one.

    `deadline` and `queue_by` are monotonic seconds.
    """
    body = encode_inputs(inputs, options)
    return Draft(job_id, op, len(inputs), tokens, body, client, deadline, queue_by, tenant)


class Submission(NamedTuple):
    """Jobs to be accepted together.

    Refused jobs are sent again until `until`, monotonic seconds: None means for ever, 0.0 never. `tenant` is set if
    each tenant has its own rate limit. `accepted` is called once the server has the jobs.
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
