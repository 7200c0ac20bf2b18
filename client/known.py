"""Descriptions of services and routes as a client last read them."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

from millstream.broker.config.load import ServiceSpec
from millstream.broker.config.route import RouteSpec
from millstream.broker.contract.errors import DeadlineExceeded, MillstreamError, NoWorkers
from millstream.broker.queue.admission import resume_hint

FRESH_S = 1.0
"""Seconds for which a description of a service is reused."""


@dataclass(frozen=True, slots=True)
class Known:
    """Description of one service, as the server had it at `read_at`, monotonic seconds."""

    spec: ServiceSpec
    fingerprint: str
    live_workers: int
    paused: bool
    read_at: float
    away: MillstreamError | None = None
    """Error if the server could not be reached at `read_at`; the other fields are then from an earlier read."""
    token: str = ""
    emptied_at: float = 0.0
    """Time at which this process saw that the server had lost its data, monotonic seconds; 0 is never."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def fresh(self) -> bool:
        """Whether the description is new enough to begin a call: it is at most FRESH_S old."""
        return time.monotonic() - self.read_at <= FRESH_S

    @property
    def takes_jobs(self) -> bool:
        """Whether a job that is sent to the service would run: a worker lives, and the service is not paused."""
        return bool(self.live_workers) and not self.paused and self.away is None

    @property
    def has_no_workers(self) -> bool:
        """Whether the server said that no worker lives, and no pause is the reason."""
        return self.away is None and not (self.live_workers or self.paused)

    @property
    def stuck(self) -> bool:
        """Whether a call without a time limit should end: the server is unreachable, or no worker lives and no pause
        is the reason."""
        return self.away is not None or self.has_no_workers

    def why_late(self, sent_at: float | None = None) -> MillstreamError:
        """Returns the error of a call whose deadline is over: no server, a lost job, no live worker, a pause, or slow.

        `sent_at` is when its job was sent, monotonic seconds: if the server was emptied later, the job is lost.
        """
        if self.away:
            return copy.copy(self.away)
        if sent_at is not None and sent_at < self.emptied_at:
            return DeadlineExceeded(
                f"no answer from service {self.name!r} in time: the server was emptied and has lost the job",
                hint="call again; the server's log says whether it was restarted without its data (appendonly yes "
                "keeps it) or flushed",
            )
        if not self.live_workers:
            start = "start one with `millstream up` or `millstream worker run`"
            return NoWorkers(
                f"no worker of service {self.name!r} is alive; the job was accepted and not answered",
                hint=f"{start}; the service is paused, too: {resume_hint(self.name)}" if self.paused else start,
            )
        if self.paused:
            return DeadlineExceeded(
                f"no answer from service {self.name!r} in time: it is paused", hint=resume_hint(self.name)
            )
        return DeadlineExceeded(
            f"no answer from service {self.name!r} in time, with {self.live_workers} workers alive",
            hint="see `millstream queue ls`; raise the timeout or add workers",
        )


@dataclass(frozen=True, slots=True)
class KnownRoute:
    """A route, and its versions' services as last read. `read_at` is as in Known; -inf while they were not all read."""

    route: RouteSpec
    read_at: float = -math.inf

    @property
    def fresh(self) -> bool:
        """Does as Known.fresh."""
        return time.monotonic() - self.read_at <= FRESH_S
