"""Sends jobs until they are accepted: the retry loop of clients, detached calls and requeued dead letters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.contract.job import Priority
from millstream.broker.queue.admission import refusal
from millstream.broker.queue.backlog import Backlog, Why
from millstream.broker.queue.stream_types import Admission, Group
from millstream.broker.queue.streams import Streams
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.error_map import is_transient, translated

AWAY_PAUSE_S = 0.1
"""Seconds between two attempts while the server is unreachable."""

Refuse = Callable[[Submission, MillstreamError], None]


class Submitter:
    """Sends submissions, and stores refused ones until they may be sent again. For one thread.

    `refuse` is called with each submission that will not be sent again, in the thread that sends. `where` is the
    server's URL in errors.
    """

    def __init__(self, streams: Callable[[str], Streams], where: str, refuse: Refuse) -> None:
        self._streams = streams
        self._where = where
        self._refuse = refuse
        self._backlog = Backlog()

    @property
    def next_at(self) -> float | None:
        """Time of the next `retry`, monotonic seconds; None if nothing waits."""
        return self._backlog.next_at

    def refusal_of(self, job_id: str) -> MillstreamError | None:
        """Returns why a job waits to be sent again; None if it does not. From any thread."""
        return self._backlog.refusal_of(job_id)

    def withdraw(self, job_ids: Sequence[str]) -> set[str]:
        """Stops sending these jobs again, and returns those of them that waited."""
        return self._backlog.withdraw(job_ids)

    def close(self, error: Callable[[], MillstreamError]) -> None:
        """Refuses all submissions that wait, each with an error that `error` makes."""
        for submission in self._backlog.drain():
            self._refuse(submission, error())

    def submit(self, batch: Sequence[Submission]) -> None:
        """Sends submissions of one service, except those that must wait behind earlier ones."""
        if self._backlog.next_at is not None:
            batch = [each for each in batch if not self._waits(each)]
        if batch:
            self._send(batch)

    def retry(self) -> None:
        """Sends the submissions that may be sent again now, in one script call, and refuses expired ones."""
        if not self._backlog:
            return
        now = time.monotonic()
        for submission, why in self._backlog.take_expired(now):
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
        except Exception as error:  # noqa: BLE001 - each caller gets the error, and the thread serves later calls
            self._handle_failure(batch, error)
            return
        refused: list[tuple[Submission, Admission]] = []
        waits = bool(self._backlog)
        for submission, admission in zip(batch, admissions, strict=True):
            if admission.refused:
                refused.append((submission, admission))
                continue
            if waits:
                self._backlog.note_accepted(submission)
            if submission.accepted:
                submission.accepted()
        if refused:
            self._handle_refusals(refused)

    def _handle_refusals(self, refused: Sequence[tuple[Submission, Admission]]) -> None:
        """Puts back what may be accepted later. The first refusal of a line applies to all submissions behind it."""
        first: dict[tuple[Priority, str], Admission] = {}
        lines: dict[tuple[Priority, str], list[Submission]] = {}
        for submission, admission in refused:
            error = _refusal(submission.service, submission.group.priority, admission)
            if not error.retryable:
                self._refuse(submission, error)
                continue
            line = submission.group.priority, submission.tenant
            first.setdefault(line, admission)
            lines.setdefault(line, []).append(submission)
        for line, submissions in lines.items():
            admission = first[line]
            why = partial(_refusal, submissions[0].service, line[0], admission)
            of_tenant = admission.refused in ("rate_limited", "tenant_full")
            self._send_later(submissions, why, admission.retry_after, whole_queue=not of_tenant)

    def _handle_failure(self, batch: Sequence[Submission], error: Exception) -> None:
        ours = _ours(error)
        pause = ours.retry_after or (AWAY_PAUSE_S if is_transient(error) else None)
        lines: dict[tuple[Priority, str], list[Submission]] = {}
        for submission in batch:
            lines.setdefault((submission.group.priority, submission.tenant), []).append(submission)
        for submissions in lines.values():
            self._send_later(submissions, partial(copy.copy, ours), pause, whole_queue=True, counted=False)

    def _send_later(
        self,
        submissions: Sequence[Submission],
        why: Why,
        pause: float | None,
        *,
        whole_queue: bool,
        counted: bool = True,
    ) -> None:
        """Puts submissions back for `pause` seconds. Refuses those whose `until` is earlier; all if `pause` is None."""
        at = time.monotonic() + (pause or 0.0)
        final = [each for each in submissions if pause is None or (each.until is not None and at >= each.until)]
        retried = [each for each in submissions if each not in final] if final else submissions
        if retried:
            self._backlog.put_back(retried, why, at, whole_queue=whole_queue, counted=counted)
        for submission in final:
            self._refuse(submission, why())


class _Verdict:
    """The sink of one submission: stores its error."""

    error: MillstreamError | None = None

    def answered(self, job_id: str, reply: bytes) -> None:
        """Does nothing: nobody reads replies here."""

    def emitted(self, job_id: str, delta: bytes) -> None:
        """Does nothing: nobody reads deltas here."""

    def refused(self, job_ids: Sequence[str], error: MillstreamError) -> None:
        self.error = error


def deliver(streams: Streams, where: str, service: str, group: Group, wait_s: float = 0.0) -> None:
    """Blocks until the server has accepted `group`: for at most `wait_s` seconds while it refuses or is unreachable.

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


def _refusal(service: str, priority: Priority, admission: Admission) -> MillstreamError:
    return refusal(service, priority, admission) or MillstreamError(f"refused: {admission.refused}")


def _ours(error: Exception) -> MillstreamError:
    """Returns the error without its traceback, which would keep the batch alive while it waits."""
    if isinstance(error, MillstreamError):
        return copy.copy(error)
    return BrokerUnavailable(f"enqueue failed: {type(error).__name__}: {error}")
