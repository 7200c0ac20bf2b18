"""The nouns of the queue: Priority, Draft, Job, Claim, Reply. Frozen data, no I/O.

Named tuples, not frozen dataclasses: several are made for each job, and they are made three times as fast.
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
"""Vectors as a caller asked for them: as float32, as float16, or as a bit a number."""


class Priority(StrEnum):
    """Which of a service's three streams a job waits in."""

    REALTIME = "realtime"
    NORMAL = "normal"
    BATCH = "batch"


PRIORITIES = tuple(Priority)
"""Most urgent first."""


class Draft(NamedTuple):
    """A job before the server stamped it. `deadline` and `queue_by` are seconds of this process's monotonic clock.

    They are sent as what remains of them, so that hosts need not agree on a clock; None is no limit. `tokens` is the
    caller's estimate. An empty `client` makes the job detached.
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
    """One stream entry. Times are ms of the server's clock; 0 means no limit."""

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
    """The detached call that it is part of."""

    def missed(self, now: int) -> str:
        """The phase whose limit has passed at `now` (server ms): "total", "queue", or "" where there is still time."""
        if self.deadline and now >= self.deadline:
            return "total"
        if self.queue_by and now >= self.queue_by:
            return "queue"
        return ""


class Address(NamedTuple):
    """Where an entry lies, and to whom its answer goes. All that settling needs.

    `name` is how the scripts call the entry: its stream, 1 to 3, the most urgent first; a colon; the entry id.
    """

    name: str
    job_id: str = ""
    client: str = ""
    call: str = ""
    streams: bool = False
    """Whether its operation shows what it generates while it runs."""

    @property
    def priority(self) -> Priority:
        return PRIORITIES[int(self.name[0]) - 1]

    @property
    def entry(self) -> str:
        """The entry's id in its stream."""
        return self.name[2:]


class Claim(NamedTuple):
    """An entry this worker holds. `job` is None where the entry is malformed; `malformed` then says how.

    `attempts` counts starts that did not end: 0.5 for each host lost while it held the job (nobody can say what ran).
    `by_share`: it was taken before more urgent ones, and runs before them. `newer`: `job` is None because the entry has
    a version that only newer workers read. `given_back`: another worker held it before.
    """

    address: Address
    job: Job | None
    attempts: float = 0.0
    malformed: str = ""
    by_share: bool = False
    newer: bool = False
    given_back: bool = False


class Reply(NamedTuple):
    """The answer to one job: an outcome for each row, or one `error` for all of them.

    `vectors` is [rows without an error, dim], in row order, float32 unless the job asked for another encoding; `values`
    is the same for services whose results are JSON. `errors` maps a row's index to its error. `tokens` and `truncated`
    are per job; `timings` is in ms. `fingerprint` names the weights that made the answer, `version` the version of the
    model; either is empty if the worker does not say.
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
