"""Jobs in a worker's hand, without a server."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Address, Claim, Job, Json, Priority
from millstream.broker.contract.keys import STREAM_INDEX
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import ActiveJob

NOW = 1_000_000
"""Server ms at which these jobs were accepted."""


def claim_of(
    inputs: Sequence[Json] = ("a",),
    *,
    priority: Priority = Priority.NORMAL,
    at: int = NOW,
    op: str = "echo",
    deadline: int = 0,
    queue_by: int = 0,
    attempts: float = 0.0,
    options: Mapping[str, Json] | None = None,
    body: bytes | None = None,
) -> Claim:
    job_id = secrets.token_hex(16)
    encoded = encode_inputs(inputs, options or {}) if body is None else body
    job = Job(job_id, at, op, len(inputs), len(inputs), deadline, queue_by, "caller", "", "", encoded)
    return Claim(Address(f"{STREAM_INDEX[priority]}:{at}-{int(job_id[:6], 16)}", job_id, "caller"), job, attempts)


def held_of(tokens: Sequence[int | MillstreamError] = (3,), claim: Claim | None = None) -> ActiveJob:
    """A job with a prepared row of each length, or the error that stands in a row's place."""
    claim = claim or claim_of(["x"] * len(tokens))
    assert claim.job is not None
    rows = [Prepared(each, f"row {at}") if isinstance(each, int) else each for at, each in enumerate(tokens)]
    return ActiveJob(claim, claim.job, rows)
