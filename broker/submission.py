"""Submitting jobs until they are accepted: the one retry loop of clients, detached calls and requeued dead letters.

A refused submission waits in a line. The first of a line is sent again as a probe, and the others keep their places
behind it: however many callers wait, the server is asked about once for each time that it named.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from millstream.broker.admission import refusal
from millstream.broker.codec import encode_inputs
from millstream.broker.errors import BrokerUnavailable, MillstreamError
from millstream.broker.faults import is_transient, translated
from millstream.broker.job import Draft, Json, Priority
from millstream.broker.streams import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, Admission, Group, Streams

AWAY_PAUSE_S = 0.1
"""Seconds between two tries while the server is away."""

LARGEST_BURST = MAX_JOBS_PER_CALL
"""Most submissions sent together after probes were accepted: 1, 2, 4 and so on, as TCP's slow start."""


class Sink(Protocol):
    """Hears what became of jobs. Called from the threads that send and read: must be quick."""

    def answered(self, job_id: str, reply: bytes) -> None: ...

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None: ...


def draft_job(
    job_id: str,
    op: str,
    inputs: Sequence[Json],
    tokens: int,
    options: Mapping[str, Json],
    client: str = "",
    deadline: float | None = None,
    queue_by: float | None = None,
    tenant: str = "",
) -> Draft:
    """The job that carries `inputs`, one a row. Raises TypeError or ValueError for what JSON cannot carry."""
    body = encode_inputs(inputs, options)
    return Draft(job_id, op, len(inputs), tokens, body, client, deadline, queue_by, tenant)


class Submission(NamedTuple):
    """Jobs to be accepted together.

    Refusals are waited out until `until`, monotonic seconds: None for ever, 0.0 not at all. `tenant` is set if the rate
    limit counts tenants apart. `accepted` is called once the server has the jobs.
    """

    service: str
    group: Group
    sink: Sink
    until: float | None
    tenant: str = ""
    accepted: Callable[[], None] | None = None

    @property
    def job_ids(self) -> list[str]:
        return [draft.id for draft in self.group.drafts]

    @property
    def jobs(self) -> int:
        return len(self.group.drafts)

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum([len(draft.body) for draft in self.group.drafts])


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

    @property
    def next_at(self) -> float | None:
        """When the next submission may be sent; None if none waits."""
        moments = [max(queue.at, line.at) for queue in self._queues.values() for line in queue.lines.values()]
        return min(moments, default=None)

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Why a job waits here; None if it does not."""
        line = self._line_of.get(job_id)
        return line.why() if line else None

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
        key = _key(submission)
        if queue := self._queues.get(key):
            queue.burst, queue.at = min(queue.burst + 1, LARGEST_BURST), 0.0
            self._tidy(key, queue)

    def take(self, now: float) -> list[Submission]:
        """The submissions that may be sent now, of one queue, for one script call. Those refused are to be put back."""
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


Refuse = Callable[[Submission, MillstreamError], None]


class Submitter:
    """Sends submissions, and keeps those that were refused until they may be sent again. For one thread.

    `refuse` is told of each submission that will not be sent again, in the thread that sends. `where` names the server.
    """

    def __init__(self, streams: Callable[[str], Streams], where: str, refuse: Refuse) -> None:
        self._streams = streams
        self._where = where
        self._refuse = refuse
        self._backlog = Backlog()

    @property
    def next_at(self) -> float | None:
        """When `retry` has something to do, monotonic seconds; None if nothing waits."""
        return self._backlog.next_at

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Why a job waits to be sent again; None if it does not. From any thread."""
        return self._backlog.refusal_of(job_id)

    def withdraw(self, job_ids: Sequence[str]) -> set[str]:
        """Do not send these jobs any more; those that waited to be sent again."""
        return self._backlog.withdraw(job_ids)

    def close(self, error: Callable[[], MillstreamError]) -> None:
        """Send nothing any more: refuse what waits."""
        for submission in self._backlog.drain():
            self._refuse(submission, error())

    def submit(self, batch: Sequence[Submission]) -> None:
        """Send submissions of one service, but those that must wait behind earlier ones."""
        if self._backlog.next_at is not None:
            batch = [each for each in batch if not self._waits(each)]
        if batch:
            self._send(batch)

    def retry(self) -> None:
        """Send what may be sent again now, in one script call."""
        now = time.monotonic()
        for submission, why in self._backlog.expired(now):
            self._refuse(submission, why())
        if batch := self._backlog.take(now):
            self._send(batch)

    def _waits(self, submission: Submission) -> bool:
        why = self._backlog.append(submission)
        if why and submission.until == 0.0:
            self._refuse(submission, why())
        return why is not None

    def _send(self, batch: Sequence[Submission]) -> None:
        try:
            with translated(self._where):
                admissions = self._streams(batch[0].service).enqueue([submission.group for submission in batch])
        except Exception as error:  # noqa: BLE001 - every caller hears of it; the next ones are served
            self._failed(batch, error)
            return
        refused: list[tuple[Submission, Admission]] = []
        for submission, admission in zip(batch, admissions, strict=True):
            if admission.refused:
                refused.append((submission, admission))
            else:
                self._backlog.accepted(submission)
                if submission.accepted:
                    submission.accepted()
        if refused:
            self._turned_away(refused)

    def _turned_away(self, refused: Sequence[tuple[Submission, Admission]]) -> None:
        """Put back what may be accepted later; the first refusal of a line holds for those behind it."""
        first: dict[tuple[Priority, str], Admission] = {}
        lines: dict[tuple[Priority, str], list[Submission]] = {}
        for submission, admission in refused:
            error = _refusal(submission.service, admission)
            if not error.retryable:
                self._refuse(submission, error)
                continue
            line = submission.group.priority, submission.tenant
            first.setdefault(line, admission)
            lines.setdefault(line, []).append(submission)
        for line, submissions in lines.items():
            admission = first[line]
            why = partial(_refusal, submissions[0].service, admission)
            self._again(submissions, why, admission.retry_after, whole_queue=admission.refused != "rate_limited")

    def _failed(self, batch: Sequence[Submission], error: Exception) -> None:
        ours = _ours(error)
        pause = ours.retry_after or (AWAY_PAUSE_S if is_transient(error) else None)
        lines: dict[tuple[Priority, str], list[Submission]] = {}
        for submission in batch:
            lines.setdefault((submission.group.priority, submission.tenant), []).append(submission)
        for submissions in lines.values():
            self._again(submissions, partial(copy.copy, ours), pause, whole_queue=True, counted=False)

    def _again(
        self,
        submissions: Sequence[Submission],
        why: Why,
        pause: float | None,
        *,
        whole_queue: bool,
        counted: bool = True,
    ) -> None:
        """Send again after `pause` seconds, or tell the sink if there is no time or, without a `pause`, no hope."""
        at = time.monotonic() + (pause or 0.0)
        hopeless = [each for each in submissions if pause is None or (each.until is not None and at >= each.until)]
        patient = [each for each in submissions if each not in hopeless] if hopeless else submissions
        if patient:
            self._backlog.put_back(patient, why, at, whole_queue=whole_queue, counted=counted)
        for submission in hopeless:
            self._refuse(submission, why())


class _Verdict:
    """What became of one submission. Is its sink."""

    error: MillstreamError | None = None

    def answered(self, job_id: str, reply: bytes) -> None:
        """Nobody here reads replies."""

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.error = error


def deliver(streams: Streams, where: str, service: str, group: Group, wait_s: float = 0.0) -> None:
    """Blocks until the server has accepted `group`; waits for at most `wait_s` seconds for room, or for the server.

    Raises QueueFull, RateLimited, ServicePaused, UnknownService, InvalidRequest, BrokerUnavailable.
    """
    verdict = _Verdict()
    submitter = Submitter(lambda service: streams, where, lambda each, error: each.sink.refused(each.job_ids, error))
    submitter.submit([Submission(service, group, verdict, time.monotonic() + wait_s if wait_s else 0.0)])
    while (at := submitter.next_at) is not None:
        time.sleep(max(0.0, at - time.monotonic()))
        submitter.retry()
    if verdict.error:
        raise verdict.error


def _refusal(service: str, admission: Admission) -> MillstreamError:
    return refusal(service, admission) or MillstreamError(f"refused: {admission.refused}")


def _ours(error: Exception) -> MillstreamError:
    """An error without its traceback, which would keep the batch alive while it waits."""
    if isinstance(error, MillstreamError):
        return copy.copy(error)
    return BrokerUnavailable(f"enqueue failed: {type(error).__name__}: {error}")
