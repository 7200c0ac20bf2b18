"""One call under way: its rows, the jobs that carry them, and what came back."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from millstream.broker.codec import decode_reply, encode_inputs
from millstream.broker.errors import DeadlineExceeded, Malformed, MillstreamError, ModelFailed, PartialFailure
from millstream.broker.job import Draft, Json, Priority, Reply, Vectors
from millstream.broker.streams import Group
from millstream.client.channel import Channel, Submission
from millstream.client.result import Embeddings, Timings
from millstream.client.split import Part


@dataclass(frozen=True, slots=True)
class Terms:
    """How a call is to be run. Times in seconds; None is no limit.

    `timeout` bounds the whole call. Without it each job has `total_timeout` from the moment it is sent, so that a call
    of any length ends only when its progress does. `window` is how many jobs may be under way at once.
    """

    service: str
    op: str
    priority: Priority
    options: Mapping[str, Json]
    timeout: float | None
    total_timeout: float | None
    queue_timeout: float | None
    wait: bool
    window: int
    tenant: str = ""


class Handle:
    """A submitted call. `result` may be asked from any thread, again and again."""

    def __init__(
        self,
        channel: Channel,
        terms: Terms,
        inputs: Sequence[Json],
        parts: Sequence[Part],
        refused: Mapping[int, MillstreamError],
        why_late: Callable[[str], MillstreamError],
    ) -> None:
        self.id = secrets.token_hex(16)
        self._channel = channel
        self._terms = terms
        self._inputs = inputs
        self._why_late = why_late
        self._changed = threading.Condition()
        self._unsent = deque(parts)
        self._sent: dict[str, tuple[Part, float | None]] = {}
        self._arrived: list[tuple[Part, Reply | MillstreamError]] = []
        self._rows: list[Vectors | Json | MillstreamError] = [None] * len(inputs)
        self._left = len(inputs) - len(refused)
        self._tokens = 0
        self._truncated: list[int] = []
        self._timings: dict[str, float] = {}
        self._began = time.monotonic()
        self._end = None if terms.timeout is None else self._began + terms.timeout
        for row, error in refused.items():
            self._rows[row] = error
        self._pump()

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self.wait(0)

    @property
    def rows_done(self) -> int:
        """Rows that have their outcome, for a progress bar."""
        with self._changed:
            self._collect()
            return len(self._rows) - self._left

    def result(self, timeout: float | None = None) -> Embeddings | list[Json]:
        """The results in the order of the inputs, waiting for at most `timeout` seconds.

        Raises DeadlineExceeded where this wait was too short (the call goes on), or the call's own error:
        PartialFailure where some rows failed, with the others' results; the rows' error where all failed alike.
        """
        if not self.wait(timeout):
            raise DeadlineExceeded(f"no result within {timeout:g} s of waiting", phase="total")
        with self._changed:
            return self._outcome()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for at most `timeout` seconds until every row has its outcome; whether they have."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                self._collect()
                if not self._left:
                    return True
                now = time.monotonic()
                if until is not None and now >= until:
                    return False
                if overdue := [job for job, (_, end) in self._sent.items() if end is not None and now >= end]:
                    self._give_up(overdue)
                    continue
                self._changed.wait(_soonest(now, until, *(end for _, end in self._sent.values())))

    # -- the channel's side ------------------------------------------------------------------------------------

    def answered(self, job_id: str, reply: bytes) -> None:
        """A job's reply came. Called by the channel."""
        outcome: Reply | MillstreamError
        try:
            outcome = decode_reply(reply)
        except Malformed as error:
            outcome = ModelFailed(f"its reply cannot be read: {error}", hint="client and worker of different versions?")
        with self._changed:
            if job_id in self._sent:
                self._arrived.append((self._sent.pop(job_id)[0], outcome))
                self._changed.notify_all()
        self._pump()

    def refused(self, drafts: Sequence[Draft], error: MillstreamError) -> None:
        """Jobs were not accepted, and will not be tried again. Called by the channel."""
        self._channel.forget(self._terms.service, [draft.id for draft in drafts])
        with self._changed:
            parts = [self._sent.pop(draft.id)[0] for draft in drafts if draft.id in self._sent]
            # What was not sent yet has no better prospects.
            parts += self._unsent
            self._unsent.clear()
            self._arrived += [(part, error) for part in parts]
            self._changed.notify_all()

    def _pump(self) -> None:
        """Send what the window has room for."""
        with self._changed:
            submissions = []
            while self._unsent and len(self._sent) < self._terms.window:
                submissions.append(self._submission(self._unsent.popleft()))
        if submissions and not self._terms.wait:
            drafts = [draft for submission in submissions for draft in submission.group.drafts]
            submissions = [Submission(self._terms.service, Group(self._terms.priority, drafts), self, until=0.0)]
        if submissions:
            self._channel.submit(submissions)

    def _submission(self, part: Part) -> Submission:
        terms, now = self._terms, time.monotonic()
        own_end = None if terms.total_timeout is None else now + terms.total_timeout
        end = self._end if self._end is not None else own_end
        draft = Draft(
            id=secrets.token_hex(16) if self._sent or self._unsent else self.id,
            op=terms.op,
            rows=len(part.rows),
            tokens=part.tokens,
            body=encode_inputs([self._inputs[row] for row in part.rows], terms.options),
            client=self._channel.client_id,
            deadline=end,
            queue_by=None if terms.queue_timeout is None else now + terms.queue_timeout,
            tenant=terms.tenant,
        )
        self._sent[draft.id] = (part, end)
        return Submission(terms.service, Group(terms.priority, [draft]), self, until=end)

    # -- the waiter's side, under the lock ---------------------------------------------------------------------

    def _give_up(self, overdue: Sequence[str]) -> None:
        parts = [self._sent.pop(job)[0] for job in overdue]
        parts += self._unsent
        self._unsent.clear()
        self._channel.forget(self._terms.service, overdue)
        # Asking the server why takes a round trip: not under the lock, the channel's threads may want it.
        self._changed.release()
        try:
            error = self._why_late(self._terms.service)
        finally:
            self._changed.acquire()
        self._arrived += [(part, error) for part in parts]

    def _collect(self) -> None:
        """Put what arrived into its rows."""
        arrived, self._arrived = self._arrived, []
        for part, outcome in arrived:
            self._left -= len(part.rows)
            if isinstance(outcome, Reply):
                self._place(part, outcome)
            else:
                for row in part.rows:
                    self._rows[row] = outcome

    def _place(self, part: Part, reply: Reply) -> None:
        good = iter(reply.vectors if reply.vectors is not None else reply.values or [])
        for at, row in enumerate(part.rows):
            error = reply.error or reply.errors.get(at)
            self._rows[row] = error or next(good, _MISSING)
        self._tokens += reply.tokens
        self._truncated += [part.rows[at] for at in reply.truncated]
        for name, ms in reply.timings.items():
            self._timings[name] = max(ms, self._timings.get(name, 0.0))

    def _outcome(self) -> Embeddings | list[Json]:
        errors = {row: each for row, each in enumerate(self._rows) if isinstance(each, MillstreamError)}
        if errors:
            raise _failure(errors, self._rows)
        timings: Timings = {**self._timings, "total": (time.monotonic() - self._began) * 1000}
        if self._rows and isinstance(self._rows[0], np.ndarray):
            return Embeddings.of(
                np.stack(cast(list[Vectors], self._rows)), self._tokens, tuple(sorted(self._truncated)), timings
            )
        return cast(list[Json], list(self._rows))


_MISSING = ModelFailed("the worker's reply has no result for this row")


def _failure(errors: Mapping[int, MillstreamError], rows: Sequence[object]) -> MillstreamError:
    """One error for the call: the rows' own where all failed alike, else PartialFailure."""
    first_row, first = next(iter(errors.items()))
    if len(errors) == len(rows) and all(type(error) is type(first) for error in errors.values()):
        return first
    results = [None if row in errors else result for row, result in enumerate(rows)]
    message = f"{len(errors)} of {len(rows)} rows failed; row {first_row}: {first}"
    return PartialFailure(message, errors=errors, results=results)


def _soonest(now: float, *moments: float | None) -> float | None:
    """Seconds from `now` to the first of `moments`; None where there is none."""
    given = [moment for moment in moments if moment is not None]
    return max(0.0, min(given) - now) if given else None
