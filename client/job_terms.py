"""Job terms: how the jobs of a call are made and run, and the interfaces to the channel and the services it uses."""

from __future__ import annotations

import math
import os
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Draft, Json, Priority
from millstream.broker.contract.operations import STREAMING_OPS
from millstream.broker.contract.scalars import plain
from millstream.broker.queue.stream_types import Group
from millstream.broker.queue.submission import Sink, Submission
from millstream.client.channel.requests import Cancellation
from millstream.client.known import Known

_random = random.Random(secrets.randbits(256))

# Without a new seed a forked child would make the same ids as its parent.
os.register_at_fork(after_in_child=lambda: _random.seed(secrets.randbits(256)))


def new_job_id() -> str:
    """Returns 32 hexadecimal digits from 128 random bits, so that ids do not collide.

    Not a secret: the system's own generator would cost a system call for each job.
    """
    return f"{_random.getrandbits(128):032x}"


class JobTerms(NamedTuple):
    """Terms of a call, which hold for all its jobs. Times are in seconds; None is no limit.

    `timeout` limits the whole call. Without it the call ends when no job was answered for `total_timeout`: a call of
    any length goes on while it makes progress; a piece of a growing text is progress, too. Without both it ends when no
    job was answered for `idle_timeout` and no worker is alive. `most_jobs` is the largest number of jobs in flight;
    `at_once` is the number of jobs that one worker runs at the same time. `trace` is the context of the call's span, or
    "". `version` is the version of the call's route, or "". A call that is not `charged` costs no rate limit anything,
    and is not counted if it is refused.
    """

    service: str
    op: str
    priority: Priority
    options: Mapping[str, Json]
    timeout: float | None
    total_timeout: float | None
    queue_timeout: float | None
    wait: bool
    most_jobs: int
    tenant: str = ""
    replicated: bool = False
    limits_tenants: bool = False
    idle_timeout: float | None = None
    at_once: int = 1
    trace: str = ""
    version: str = ""
    charged: bool = True

    def draft(
        self, job_id: str, rows: Sequence[Json], tokens: int, client: str, end: float | None, now: float
    ) -> Draft:
        """Returns a job of the call that ends at `end`; None means that the job has its own limit from `now`.

        Both are monotonic seconds. Raises TypeError, ValueError or RecursionError if JSON cannot represent a row.
        """
        # A job whose text grows may run for any time: the call ends if it does not grow for total_timeout.
        if end is None and self.total_timeout is not None and self.op not in STREAMING_OPS:
            end = now + self.total_timeout
        queue_by = None if self.queue_timeout is None else now + self.queue_timeout
        body = encode_inputs(rows, self.options)
        return Draft(job_id, self.op, len(rows), tokens, body, client, end, queue_by, self.tenant, self.trace)

    def submissions(self, drafts: Sequence[Draft], sink: Sink, charged_with: str) -> list[Submission]:
        """Returns one submission for each job, which waits for room by itself.

        If the call does not wait for room, returns one submission for all jobs, which are accepted or refused together.
        The rate limit counts the call once, with the job `charged_with`.
        """
        tenant = self.tenant if self.limits_tenants else ""
        submissions = []
        for together in [[draft] for draft in drafts] if self.wait else [drafts]:
            first = together[0]
            calls = int(first.id == charged_with)
            cost, refusals = (calls, calls) if self.charged else (-1, 0)
            group = Group(self.priority, together, cost, self.replicated, refusals=refusals)
            submissions.append(Submission(self.service, group, sink, first.deadline if self.wait else 0.0, tenant))
        return submissions


def seconds_of(timeout: float | None) -> float | None:
    """Returns the seconds that a wait may take; None is no limit.

    Raises InvalidRequest if `timeout` is not a number, or NaN: a wait until NaN would never end.
    """
    seconds = plain(timeout)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or math.isnan(seconds):
        raise InvalidRequest(f"timeout={timeout!r} is not a number of seconds", hint="None is no limit")
    return seconds


def waits_until(timeout: float | None) -> float | None:
    """Returns when a wait of `timeout` seconds ends, monotonic seconds; None if it has no limit.

    Raises InvalidRequest if `timeout` is not a number of seconds.
    """
    if timeout is None:
        return None
    seconds = seconds_of(timeout)
    return None if seconds is None else time.monotonic() + seconds


class Progress:
    """Time `at` which a job of a call, or of the calls of one map, was last answered; monotonic seconds.

    `version` is the version of a route that all calls of a map go to, "" before the first one.
    """

    def __init__(self, at: float | None = None) -> None:
        self.at = time.monotonic() if at is None else at
        self.version = ""


class Watch(Protocol):
    """Questions of a call about its service. No method waits for the server."""

    def live(self, service: str, changed: Callable[[], None]) -> int:
        """Returns the number of live workers, at least 1, as last read; calls `changed` if a later read differs."""

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        """Calls `tell` with the state of the service, soon and from any thread."""

    def last_known(self, service: str) -> Known:
        """Returns the state of the service as last read."""


class CallChannel(Protocol):
    """Part of a channel that a call uses."""

    @property
    def client_id(self) -> str: ...

    def submit(self, submissions: Sequence[Submission]) -> None: ...

    def cancel(self, cancellation: Cancellation) -> None: ...

    def refusal_of(self, job_id: str) -> MillstreamError | None: ...
