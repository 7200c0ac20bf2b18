"""Jobs that are alike and under way at the same time: one is sent, the others get its answer."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread

from millstream.broker.errors import MillstreamError
from millstream.broker.streams import CancelOutcome
from millstream.broker.submission import Sink, Submission
from millstream.client.channel import Channel
from millstream.client.orders import Cancellation

_FAILED = b'{"v":1,"error'
"""How the reply of a job begins that failed, or of whose rows one did."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A job that was sent, as its sink, and those that wait for its answer, by job id."""

    flights: Flights
    key: Hashable
    job_id: str
    sink: Sink
    end: float | None
    followers: dict[str, Submission] = field(default_factory=dict)

    def answered(self, job_id: str, reply: bytes) -> None:
        followers = self.flights.land(self)
        self.sink.answered(job_id, reply)
        if reply.startswith(_FAILED):
            # It may have failed for what is its own: a shorter time, a worker's death.
            self.flights.send(followers.values())
            return
        for follower, submission in followers.items():
            submission.sink.answered(follower, reply)

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        followers = self.flights.land(self)
        self.sink.refused(job_ids, error)
        self.flights.send(followers.values())


class Flights:
    """A channel for services with a cache, in front of the real one.

    The rate limit does not charge who gets another one's answer, no more than one whom the cache answers. Each keeps
    its own time, and is sent itself where the other job is cancelled, given up, refused or fails.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: its parent's calls are not its calls."""
        self._lock = Lock()
        self._flights: dict[Hashable, _Flight] = {}
        self._led: dict[str, _Flight] = {}
        self._followed: dict[str, _Flight] = {}

    @property
    def client_id(self) -> str:
        return self._channel.client_id

    def submit(self, submissions: Sequence[Submission]) -> None:
        """As Channel.submit."""
        own = [led for each in submissions if (led := self._board(each))]
        if not own:
            return
        try:
            self._channel.submit(own)
        except MillstreamError:
            for each in own:
                if isinstance(each.sink, _Flight):
                    self.send(self.land(each.sink).values())
            raise

    def _board(self, submission: Submission) -> Submission | None:
        """What to send for it: itself, with a flight as its sink; None where one like it is under way."""
        # Who does not wait for room must not wait for one who does.
        if submission.jobs != 1 or submission.until == 0.0:
            return submission
        (draft,) = submission.group.drafts
        key = (submission.service, submission.group.priority, draft.op, draft.tenant, draft.body)
        with self._lock:
            flight = self._flights.get(key)
            # A caller may have dropped its call, and nobody gives it up: its answer may never come.
            if flight and (flight.end is None or time.monotonic() < flight.end):
                flight.followers[draft.id] = submission
                self._followed[draft.id] = flight
                return None
            led = self._flights[key] = _Flight(self, key, draft.id, submission.sink, draft.deadline)
            self._led[draft.id] = led
            return submission._replace(sink=led)

    def send(self, submissions: Iterable[Submission]) -> None:
        """Submit jobs that followed another one."""
        for submission in submissions:
            try:
                self.submit([submission])
            except MillstreamError as error:
                # Not from here: whoever landed the flight may hold the lock of another call.
                Thread(target=submission.sink.refused, args=(submission.job_ids, error), daemon=True).start()

    def land(self, flight: _Flight) -> dict[str, Submission]:
        """The flight is over; who followed it, once."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            self._led.pop(flight.job_id, None)
            followers, flight.followers = flight.followers, {}
            for job_id in followers:
                del self._followed[job_id]
        return followers

    def cancel(self, cancellation: Cancellation) -> None:
        """As Channel.cancel. Who follows a job that is cancelled is sent; who follows one no more was never sent."""
        with self._lock:
            followers = [job_id for job_id in cancellation.job_ids if job_id in self._followed]
            for job_id in followers:
                del self._followed.pop(job_id).followers[job_id]
            ended = [self._led[job_id] for job_id in cancellation.job_ids if job_id in self._led]
        sent = [job_id for job_id in cancellation.job_ids if job_id not in followers]

        def told(outcomes: Sequence[CancelOutcome] | MillstreamError) -> None:
            if not isinstance(outcomes, MillstreamError):
                found = dict(zip(sent, outcomes, strict=True))
                outcomes = [found.get(job_id, "waiting") for job_id in cancellation.job_ids]
            cancellation.told(outcomes)

        try:
            if sent:
                self._channel.cancel(Cancellation(cancellation.service, sent, told))
            else:
                told([])
        finally:
            # Also where the client is being closed: nobody else tells them.
            for flight in ended:
                self.send(self.land(flight).values())

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """As Channel.refusal_of. A job that follows another one waits for what that one waits for."""
        flight = self._followed.get(job_id)
        return self._channel.refusal_of(flight.job_id if flight else job_id)

    def forget(self, service: str, job_ids: Sequence[str]) -> None:
        """As Channel.forget."""
        self._channel.forget(service, job_ids)
