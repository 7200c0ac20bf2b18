"""Refused submissions, kept in order until they may be sent again. Pure.

The first of a line is sent again as a probe, and the others keep their places behind it: however many callers wait, the
server is asked about once for each time that it named.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.job import Priority
from millstream.broker.queue.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL
from millstream.broker.queue.submission import Submission

LARGEST_BURST = MAX_JOBS_PER_CALL
"""Most submissions sent together after probes were accepted: 1, 2, 4 and so on, as TCP's slow start."""

Why = Callable[[], MillstreamError]
"""Makes the error of a refusal. Each caller gets one of its own: a raised error keeps its caller's frames alive."""


@dataclass(slots=True, eq=False)
class _Line:
    """Submissions of one queue and one rate limit that wait in order; none is sent before `at`, monotonic seconds.

    `live` of them are still wanted.
    """

    why: Why
    at: float = 0.0
    waiting: deque[Submission] = field(default_factory=deque)
    live: int = 0


@dataclass(slots=True, eq=False)
class _Queue:
    """One priority of a service that refused jobs: its lines by tenant, in turn. From `at` on `burst` jobs are sent.

    `uncounted` calls were refused here, and the server has not counted them yet.
    """

    at: float = 0.0
    burst: int = 1
    uncounted: int = 0
    lines: dict[str, _Line] = field(default_factory=dict)


class Backlog:
    """Refused submissions, in lines. Pure: the caller says what time it is, monotonic seconds. For one thread.

    Only `refusal_of` may be called from any thread.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[str, Priority], _Queue] = {}
        self._line_of: dict[str, _Line] = {}
        # Calls of one idempotency key have the same jobs: how often each waits.
        self._times: Counter[str] = Counter()
        # Submissions taken last, which the server has not accepted yet.
        self._taken: dict[str, Why] = {}

    def __bool__(self) -> bool:
        """Whether a submission waits, or was taken and is not accepted yet."""
        return bool(self._queues or self._taken)

    @property
    def next_at(self) -> float | None:
        """The time at which the next submission may be sent, monotonic seconds; None if none waits."""
        if not self._queues:
            return None
        moments = [max(queue.at, line.at) for queue in self._queues.values() for line in queue.lines.values()]
        return min(moments, default=None)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Why a job waits here, or is being sent again; None if it is not."""
        line = self._line_of.get(job_id)
        why = line.why if line else self._taken.get(job_id)
        return why() if why else None

    def append(self, submission: Submission) -> Why | None:
        """Put it at the end of its line and return why it has to wait; None if it may be sent at once.

        If it does not wait for room it is not kept: it must not take the room that others wait for.
        """
        queue = self._queues.get(_key(submission))
        if queue is None or not (why := _blocked(queue, submission.tenant)):
            return None
        line = queue.lines.setdefault(submission.tenant, _Line(why))
        if submission.until == 0.0:
            queue.uncounted += submission.group.refusals
        else:
            line.waiting.append(submission)
            self._name(submission, line)
        return why

    def put_back(
        self, refused: Sequence[Submission], why: Why, at: float, *, whole_queue: bool, counted: bool = True
    ) -> None:
        """Put submissions of one line, refused together, at its front in their order, not to be sent before `at`.

        `whole_queue`: the lines of the queue's other tenants must wait as long. `counted`: the server refused them, and
        does not count them again.
        """
        queue = self._queues.setdefault(_key(refused[0]), _Queue())
        queue.burst = 1
        queue.at = at if whole_queue else queue.at
        line = queue.lines.setdefault(refused[0].tenant, _Line(why))
        line.why, line.at = why, at
        queue.uncounted = 0 if counted else queue.uncounted
        for submission in reversed(refused):
            group = submission.group._replace(refusals=0) if counted else submission.group
            line.waiting.appendleft(submission._replace(group=group))
            self._name(submission, line)

    def accepted(self, submission: Submission) -> None:
        """The server took it: one more of its queue may be sent next, so that the number doubles each time."""
        for job_id in submission.job_ids if self._taken else ():
            self._taken.pop(job_id, None)
        if self._queues and (queue := self._queues.get(key := _key(submission))):
            queue.burst, queue.at = min(queue.burst + 1, LARGEST_BURST), 0.0
            self._tidy(key, queue)

    def take(self, now: float) -> list[Submission]:
        """The submissions that may be sent now, of one queue, for one script call. Those refused are to be put back."""
        self._taken.clear()
        for key, queue in self._queues.items():
            if queue.at <= now and (batch := self._burst(queue, now)):
                # The next time the other queues come first.
                self._queues[key] = self._queues.pop(key)
                return batch
        return []

    def expired(self, now: float) -> list[tuple[Submission, Why]]:
        """Takes out the submissions at the front of their lines whose `until` is over."""
        ended = []
        for key, queue in list(self._queues.items()):
            for line in queue.lines.values():
                while (first := self._first(line)) and first.until is not None and first.until <= now:
                    ended.append((self._pop(line), line.why))
            self._tidy(key, queue)
        return ended

    def drain(self) -> list[Submission]:
        """Take out all that wait."""
        waiting = [each for queue in self._queues.values() for line in queue.lines.values() for each in line.waiting]
        wanted = list(filter(self._is_wanted, waiting))
        self._queues.clear()
        self._line_of.clear()
        return wanted

    def withdraw(self, job_ids: Sequence[str]) -> set[str]:
        """Take out the submissions of these jobs; those that waited here."""
        found = {job_id: line for job_id in job_ids if (line := self._line_of.pop(job_id, None))}
        for job_id, line in found.items():
            line.live -= self._times.pop(job_id)
        for line in {id(line): line for line in found.values()}.values():
            self._sweep(line)
        for key, queue in list(self._queues.items()) if found else ():
            self._tidy(key, queue)
        return set(found)

    def _burst(self, queue: _Queue, now: float) -> list[Submission]:
        """The next submissions of the lines that may send, one of each in turn."""
        batch: list[Submission] = []
        jobs = size = 0
        turns = deque(tenant for tenant, line in queue.lines.items() if line.at <= now)
        while turns and len(batch) < queue.burst:
            line = queue.lines[tenant := turns.popleft()]
            if (first := self._first(line)) is None:
                continue
            jobs, size = jobs + first.jobs, size + first.size
            if batch and (jobs > MAX_JOBS_PER_CALL or size > MAX_BYTES_PER_CALL):
                break
            refusals = first.group.refusals + (0 if batch else queue.uncounted)
            self._taken.update(dict.fromkeys(first.job_ids, line.why))
            batch.append(self._pop(line)._replace(group=first.group._replace(refusals=refusals)))
            turns.append(tenant)
            # Behind the others, also the next time.
            queue.lines[tenant] = queue.lines.pop(tenant)
        return batch

    def _first(self, line: _Line) -> Submission | None:
        """The first one of `line` that is still wanted."""
        while line.waiting and not self._is_wanted(line.waiting[0]):
            line.waiting.popleft()
        return line.waiting[0] if line.waiting else None

    def _sweep(self, line: _Line) -> None:
        """Let go of the bodies that nobody wants, once they are more than the others."""
        if len(line.waiting) > 2 * line.live + 16:
            line.waiting = deque(each for each in line.waiting if self._is_wanted(each))

    def _is_wanted(self, submission: Submission) -> bool:
        return any(job_id in self._line_of for job_id in submission.job_ids)

    def _pop(self, line: _Line) -> Submission:
        first = line.waiting.popleft()
        self._forget(first, line)
        return first

    def _name(self, submission: Submission, line: _Line) -> None:
        self._line_of.update(dict.fromkeys(submission.job_ids, line))
        self._times.update(submission.job_ids)
        line.live += submission.jobs

    def _forget(self, submission: Submission, line: _Line) -> None:
        for job_id in filter(self._line_of.__contains__, submission.job_ids):
            line.live -= 1
            self._times[job_id] -= 1
            if not self._times[job_id]:
                del self._line_of[job_id], self._times[job_id]

    def _tidy(self, key: tuple[str, Priority], queue: _Queue) -> None:
        for tenant in [tenant for tenant, line in queue.lines.items() if not line.live]:
            del queue.lines[tenant]
        if not queue.lines:
            self._queues.pop(key, None)


def _key(submission: Submission) -> tuple[str, Priority]:
    return submission.service, submission.group.priority


def _blocked(queue: _Queue, tenant: str) -> Why | None:
    """Why a submission of `tenant` must wait: earlier ones of it do, or the queue is full for everybody."""
    if line := queue.lines.get(tenant):
        return line.why
    return next((line.why for line in queue.lines.values()), None) if queue.at else None
