"""Arguments and results of the operations on job streams (`streams.py`). Those of a claim are in `claims.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from millstream.broker.contract.job import Address, Draft, Priority
from millstream.broker.contract.partial import Delta

NO_FAILURES: Mapping[str, int] = MappingProxyType({})

LOST, DIVERGED = -1, -2
"""Outcomes of `emit`: another worker holds the job, or it is settled; the server holds other records of it."""


class DetachedCall(NamedTuple):
    """The detached call that a group of jobs is part of. `jobs` is the number of jobs of the whole call.

    `payload` identifies the call's shape, rows and webhook, see enqueue.lua: later groups with the same `id` are
    refused if their payload differs. Results live for `result_ttl_ms` after the last one; None means the worker's ttl.
    """

    id: str
    jobs: int
    payload: str
    result_ttl_ms: int | None = None


class Group(NamedTuple):
    """Jobs of one call and tenant, which are accepted or refused together.

    `calls` is the cost for the rate limit on requests: 1, or 0 for the later groups of a call; -1 is no cost for any
    limit. `replicated`: the jobs
    count as accepted once a replica has them. `refusals` is added to the count of refused calls if the group is
    refused: `calls`, and 0 when it is sent again. Jobs of a detached `call` that were accepted before are skipped.
    """

    priority: Priority
    drafts: Sequence[Draft]
    calls: int = 1
    replicated: bool = False
    refusals: int = 1
    call: DetachedCall | None = None


Refusal = Literal["unknown_service", "paused", "queue_full", "tenant_full", "rate_limited", "over_burst", "reused_key"]


class Admission(NamedTuple):
    """The server's decision on a group. `refused` is the reason, "" if it was accepted; `retry_after` is in seconds.

    `limit` is the most jobs of the group's priority that the queue holds if the reason is queue_full, the most that may
    wait of its tenant if it is tenant_full.
    """

    refused: Refusal | Literal[""] = ""
    retry_after: float = 0.0
    limit: int = 0


class Settlement(NamedTuple):
    """The outcome of one job: its encoded reply, and in `bury` the reason if it is to become a dead letter.

    `failed`: the number of the reply's rows with an error, by its code.
    """

    address: Address
    reply: bytes
    bury: str = ""
    failed: Mapping[str, int] = NO_FAILURES


class Emission(NamedTuple):
    """Output of a job since the server last confirmed `before` bytes of its records.

    `records` are whole encoded records. `delta` is their text. `forgives`: it generated enough that deaths of earlier
    workers are no longer counted against it.
    """

    address: Address
    before: int
    records: bytes
    delta: Delta
    forgives: bool = False


class Submitted(NamedTuple):
    """The state of a detached call: its `payload`, and the number of jobs that are `answered`."""

    payload: str
    answered: int


Settled = Literal["answered", "unread", "late", "unwritable"]
"""Outcome of settling a job. `unread`: the client has too many unread replies, and got an error instead of this one.
`late`: the job was settled before. `unwritable`: the reply could not be written, and the job became a dead letter."""

CancelOutcome = Literal["waiting", "running", "gone"]
