"""Refused submissions, in order, until they may be sent again. Pure.

Only the first submission of a line is sent again, as a probe; the others wait until it is accepted. So the server gets
about one request for each `retry_after`, however many callers wait.
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
"""Most submissions sent together. The number starts at 1 and doubles while they are accepted, as in TCP slow start."""

Why = Callable[[], MillstreamError]
"""Makes the error of a refusal: one for each caller, because a raised error keeps its caller's frames alive."""


@dataclass(slots=True, eq=False)
class _Line:
    """Submissions of one queue and one rate limit, in order. None is sent before `at`, monotonic seconds.

    `live` is the number of their jobs that were not withdrawn.
    """

    why: Why
    at: float = 0.0
    waiting: deque[Submission] = field(default_factory=deque)
    live: int = 0


@dataclass(slots=True, eq=False)
class _Queue:
    """One priority of a service that refused jobs. `lines` are by tenant, the next one to send first.

    Up to `burst` submissions are sent together, none before `at`, monotonic seconds. `uncounted` is the number of calls
    refused in this process that the server has not counted yet.
    """

    at: float = 0.0
    burst: int = 1
    uncounted: int = 0
    lines: dict[str, _Line] = field(default_factory=dict)


class Backlog:
    """Refused submissions, in lines. Pure: the caller passes the time, monotonic seconds.

    For one thread; only `refusal_of` may be called from any thread.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[str, Priority], _Queue] = {}
        self._line_of: dict[str, _Line] = {}
        # How many times each job waits: calls with the same idempotency key have the same jobs.
        self._times: Counter[str] = Counter()
        # Jobs of the last `take`, until the server accepts them.
        self._sending: dict[str, Why] = {}

    def __bool__(self) -> bool:
        """Tells if a submission waits, or is being sent again."""
        return bool(self._queues or self._sending)

    @property
    def next_at(self) -> float | None:
        """Time at which the next submission may be sent, monotonic seconds; None if none waits."""
        if not self._queues:
            return None
        moments = [max(queue.at, line.at) for queue in self._queues.values() for line in queue.lines.values()]
        return min(moments, default=None)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Returns why a job waits or is being sent again; None if it does neither. From any thread."""
        line = self._line_of.get(job_id)
        why = line.why if line else self._sending.get(job_id)
        return why() if why else None

    def append(self, submission: Submission) -> Why | None:
        """Adds the submission to the end of its line and returns why it must wait; None if it may be sent at once.

        If its `until` is 0.0 it is not added, only counted: its caller refuses it.
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
        """Puts submissions of one line, refused together, at its front in their order; none is sent before `at`.

        `whole_queue`: the lines of the queue's other tenants wait as long. `counted`: the server has counted the
        refusals, and must not count them again.
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

    def note_accepted(self, submission: Submission) -> None:
        """Increases the burst of its queue by one for each accepted submission, so each burst doubles it."""
        for job_id in submission.job_ids if self._sending else ():
            self._sending.pop(job_id, None)
        if self._queues and (queue := self._queues.get(key := _key(submission))):
            queue.burst, queue.at = min(queue.burst + 1, LARGEST_BURST), 0.0
            self._tidy(key, queue)

    def take(self, now: float) -> list[Submission]:
        """Removes and returns the submissions of one queue that may be sent now, in one script call.

        The caller puts back those that are refused.
        """
        self._sending.clear()
        for key, queue in self._queues.items():
            if queue.at <= now and (batch := self._burst(queue, now)):
                # Behind the other queues: they come first next time.
                self._queues[key] = self._queues.pop(key)
                return batch
        return []

    def take_expired(self, now: float) -> list[tuple[Submission, Why]]:
        """Removes and returns the submissions at the front of their lines whose `until` has passed."""
        ended = []
        for key, queue in list(self._queues.items()):
            for line in queue.lines.values():
                while (first := self._first(line)) and first.until is not None and first.until <= now:
                    ended.append((self._pop(line), line.why))
            self._tidy(key, queue)
        return ended

    def drain(self) -> list[Submission]:
        """Removes and returns all submissions that wait."""
        waiting = [each for queue in self._queues.values() for line in queue.lines.values() for each in line.waiting]
        live = list(filter(self._is_live, waiting))
        self._queues.clear()
        self._line_of.clear()
        return live

    def withdraw(self, job_ids: Sequence[str]) -> set[str]:
        """Removes these jobs, and returns those of them that waited."""
        found = {job_id: line for job_id in job_ids if (line := self._line_of.pop(job_id, None))}
        for job_id, line in found.items():
            line.live -= self._times.pop(job_id)
        for line in {id(line): line for line in found.values()}.values():
            self._sweep(line)
        for key, queue in list(self._queues.items()) if found else ():
            self._tidy(key, queue)
        return set(found)

    def _burst(self, queue: _Queue, now: float) -> list[Submission]:
        """Removes and returns the next submissions of the lines that may send, one of each line in turn."""
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
            self._sending.update(dict.fromkeys(first.job_ids, line.why))
            batch.append(self._pop(line)._replace(group=first.group._replace(refusals=refusals)))
            turns.append(tenant)
            # Behind the other tenants, also in the next burst.
            queue.lines[tenant] = queue.lines.pop(tenant)
        return batch

    def _first(self, line: _Line) -> Submission | None:
        """Returns the first submission of `line` that was not withdrawn."""
        while line.waiting and not self._is_live(line.waiting[0]):
            line.waiting.popleft()
        return line.waiting[0] if line.waiting else None

    def _sweep(self, line: _Line) -> None:
        """Frees the bodies of withdrawn submissions once they outnumber the others."""
        if len(line.waiting) > 2 * line.live + 16:
            line.waiting = deque(each for each in line.waiting if self._is_live(each))

    def _is_live(self, submission: Submission) -> bool:
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
    """Returns why a submission of `tenant` must wait: the tenant's earlier ones do, or the whole queue does."""
    if line := queue.lines.get(tenant):
        return line.why
    return next((line.why for line in queue.lines.values()), None) if queue.at else None
