"""What a call is made of: its terms, and the interfaces of the channel and of the services it needs."""

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
    """How a call is to be run. Times in seconds; None is no limit.

    `timeout` bounds the whole call. Without it the call ends when nothing of it was answered for `total_timeout`: a
    call of any length goes on as long as it makes progress. Without both it ends when nothing was answered for
    `idle_timeout` and no worker lives. `most_jobs` is how many jobs may be in flight at most.
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


def seconds_of(timeout: float | None) -> float | None:
    """The seconds that a wait may take; None is no limit.

    Raises InvalidRequest for what is no number of seconds, not-a-number among it: no wait for it would end.
    """
    seconds = plain(timeout)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or math.isnan(seconds):
        raise InvalidRequest(f"timeout={timeout!r} is not a number of seconds", hint="None is no limit")
    return seconds


def waits_until(timeout: float | None) -> float | None:
    """When a wait of `timeout` seconds ends, monotonic seconds; None if it has no limit. Raises InvalidRequest."""
    if timeout is None:
        return None
    seconds = seconds_of(timeout)
    return None if seconds is None else time.monotonic() + seconds


class Progress:
    """When something of one call, or of the calls of one map, was last answered; monotonic seconds."""

    def __init__(self, at: float | None = None) -> None:
        self.at = time.monotonic() if at is None else at


class Watch(Protocol):
    """What a call asks about its service. No method waits for the server."""

    def live(self, service: str, changed: Callable[[], None]) -> int:
        """Workers that lived when the server was last asked, at least 1; calls `changed` if it hears of others."""

    def explain(self, service: str, tell: Callable[[Known], None]) -> None:
        """Calls `tell` with the state of the service, soon, from any thread."""

    def last_known(self, service: str) -> Known:
        """The state of the service as last heard."""


class CallChannel(Protocol):
    """The part of a channel that a call uses."""

    @property
    def client_id(self) -> str: ...

    def submit(self, submissions: Sequence[Submission]) -> None: ...

    def cancel(self, cancellation: Cancellation) -> None: ...

    def refusal_of(self, job_id: str) -> MillstreamError | None: ...
