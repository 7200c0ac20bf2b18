"""Job terms: how the jobs of a call are run, and the interfaces to the channel and the services that a call uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from millstream.broker.contract.errors import InvalidRequest, MillstreamError
from millstream.broker.contract.job import Json, Priority
from millstream.broker.contract.scalars import plain
from millstream.broker.queue.submission import Submission
from millstream.client.channel.requests import Cancellation
from millstream.client.services import Known


class JobTerms(NamedTuple):
    """Terms of a call, which hold for all its jobs. Times are in seconds; None is no limit.

    `timeout` limits the whole call. Without it the call ends when no job was answered for `total_timeout`: a call of
    any length goes on while it makes progress; a piece of a growing text is progress, too. Without both it ends when no
    job was answered for `idle_timeout` and no worker is alive. `most_jobs` is the largest number of jobs in flight;
    `at_once` is the number of jobs that one worker runs at the same time.
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
    rate_per_tenant: bool = False
    idle_timeout: float | None = None
    at_once: int = 1


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
    """Time `at` which a job of a call, or of the calls of one map, was last answered; monotonic seconds."""

    def __init__(self, at: float | None = None) -> None:
        self.at = time.monotonic() if at is None else at


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
