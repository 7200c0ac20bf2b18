"""Jobs on their way to being accepted: what a submission is, who hears of it, and how a job is drafted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Draft, Json
from millstream.broker.queue.streams import Group


class Sink(Protocol):
    """Hears what became of jobs. Called from the threads that send and read: must be quick."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

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
    """The job that carries `inputs`, one a row. Raises TypeError or ValueError for what JSON cannot carry."""
    body = encode_inputs(inputs, options)
    return Draft(job_id, op, len(inputs), tokens, body, client, deadline, queue_by, tenant)


class Submission(NamedTuple):
    """Jobs to be accepted together.

    Refusals are waited out until `until`, monotonic seconds: None for ever, 0.0 not at all. `tenant` is set if the rate
    limit counts tenants apart. `accepted` is called once the server has the jobs.
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
        """Bytes of the bodies."""
        drafts = self.group.drafts
        return len(drafts[0].body) if len(drafts) == 1 else sum([len(draft.body) for draft in drafts])
