"""The types of the queue: Priority, Draft, Job, Claim, Reply. Frozen data, no I/O.

Named tuples, not frozen dataclasses: several are made for each job, and making one takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from millstream.broker.contract.errors import MillstreamError

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Vectors = NDArray[np.float32]
Scalar = np.float32 | np.float16 | np.uint8
Encoded = NDArray[Scalar]
"""Vectors in the encoding of the call: float32, float16, or uint8 with one bit for each number."""


class Priority(StrEnum):
    """The priority of a job, which selects one of the three streams of its service."""

    REALTIME = "realtime"
    NORMAL = "normal"
    BATCH = "batch"


PRIORITIES = tuple(Priority)
"""The priorities, most urgent first."""


class Draft(NamedTuple):
    """A job before the server accepts it. `deadline` and `queue_by` are seconds of this process's monotonic clock.

    The remaining time is sent, so the clocks of hosts may differ; None means no limit. `tokens` is the caller's
    estimate. If `client` is empty, the job is detached.
    """

    id: str
    op: str
    rows: int
    tokens: int
    body: bytes
    client: str = ""
    deadline: float | None = None
    queue_by: float | None = None
    tenant: str = ""
    trace: str = ""


class Job(NamedTuple):
    """A job as it lies in its stream. Times are ms of the server's clock; 0 means no limit."""

    id: str
    at: int
    op: str
    rows: int
    tokens: int
    deadline: int
    queue_by: int
    client: str
    tenant: str
    trace: str
    body: bytes
    call: str = ""
    """Id of the detached call that the job is part of, or ""."""

    def missed(self, now: int) -> str:
        """Returns the phase whose limit has passed at `now`, server ms: "total", "queue", or "" if none has."""
        if self.deadline and now >= self.deadline:
            return "total"
        if self.queue_by and now >= self.queue_by:
            return "queue"
        return ""


class Address(NamedTuple):
    """The location of an entry and the destination of its reply: all that settling needs.

    `name` is the entry's name in the scripts: its stream, 1 (most urgent) to 3, a colon, and the entry id.
    """

    name: str
    job_id: str = ""
    client: str = ""
    call: str = ""
    streams: bool = False
    """Whether its operation shows what it generates while it runs."""
    rows: int = 1
    """Rows of the job; 1 if the entry is malformed."""
    at: int = 0
    """Time when the job was accepted, server ms; 0 if the entry is malformed."""

    @property
    def priority(self) -> Priority:
        return PRIORITIES[int(self.name[0]) - 1]

    @property
    def entry(self) -> str:
        """Id of the entry in its stream."""
        return self.name[2:]


class Claim(NamedTuple):
    """An entry that this worker holds. `job` is None if the entry is malformed; `malformed` then says why.

    `attempts` counts runs that did not finish, and 0.5 for each host lost while it held the job, which may not have
    been running. `by_share`: the job was claimed before more urgent ones by its class's fair share, and runs before
    them. `newer`: `job` is None because only newer workers read the entry's version. `given_back`: another worker held
    the job before.
    """

    address: Address
    job: Job | None
    attempts: float = 0.0
    malformed: str = ""
    by_share: bool = False
    newer: bool = False
    given_back: bool = False


class Reply(NamedTuple):
    """The reply to one job: a result or an error for each row, or one `error` for all of them.

    `vectors` is [rows without an error, dim], in row order, float32 unless the job asked for another encoding. If the
    service's results are JSON, `values` has them in the same order instead. `errors` maps a row's index to its error.
    `tokens` is the job's; `truncated` has the indexes of truncated rows; `timings` are in ms. `fingerprint` names the
    weights, `version` the version of the model; either is empty if the worker does not say.
    """

    vectors: Encoded | None = None
    values: list[Json] | None = None
    errors: Mapping[int, MillstreamError] = MappingProxyType({})
    error: MillstreamError | None = None
    tokens: int = 0
    truncated: tuple[int, ...] = ()
    timings: Mapping[str, float] = MappingProxyType({})
    fingerprint: str = ""
    version: str = ""
