"""Sending jobs until they are accepted: the one retry loop of clients, detached calls and requeued dead letters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

from millstream.broker.contract.errors import BrokerUnavailable, MillstreamError
from millstream.broker.contract.job import Priority
from millstream.broker.queue.admission import refusal
from millstream.broker.queue.backlog import Backlog, Why
from millstream.broker.queue.streams import Admission, Group, Streams
from millstream.broker.queue.submission import Submission
from millstream.broker.transport.error_map import is_transient, translated

AWAY_PAUSE_S = 0.1
"""Seconds between two tries while the server is away."""

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
        if not self._backlog:
            return
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
        waits = bool(self._backlog)
        for submission, admission in zip(batch, admissions, strict=True):
            if admission.refused:
                refused.append((submission, admission))
                continue
            if waits:
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
