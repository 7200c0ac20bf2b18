"""Computes how long the jobs of a lane may still wait: time left until they are due, minus the predicted work. Pure.

A job is due at its deadline, or when its response time reaches the target of its service, whichever is earlier. Times
of the model are measured, so the slack of a lane shrinks as soon as its model gets slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from millstream.broker.contract.job import Job, Priority

TARGETS_S: Mapping[Priority, float] = {Priority.REALTIME: 1.0, Priority.NORMAL: 5.0, Priority.BATCH: 60.0}
"""Response time to aim at, seconds, if the service sets no `target`."""

NO_WORK_S = float("inf")
"""Slack, in seconds, of a lane without jobs."""


class Due(NamedTuple):
    """One job: seconds left until it is due, and seconds of work that it still needs."""

    left_s: float
    work_s: float


def targets(target_s: float | None) -> Mapping[Priority, float]:
    """Response times to aim at, by priority. `target_s`: that of the service, which batch jobs do not have."""
    if target_s is None:
        return TARGETS_S
    return {Priority.REALTIME: target_s, Priority.NORMAL: target_s, Priority.BATCH: TARGETS_S[Priority.BATCH]}


def due_at(job: Job, target_s: float) -> float:
    """Server ms at which `job` is due."""
    by_target = job.at + 1000 * target_s
    return min(by_target, job.deadline) if job.deadline else by_target


def slack_in_order(jobs: Iterable[Due], forward_s: float = 0.0) -> float:
    """Least slack of jobs that run one after the other, in the order in which they are due.

    `forward_s`: fixed seconds of a forward, whatever it computes.
    """
    least, work_s = NO_WORK_S, forward_s
    for job in sorted(jobs):
        work_s += job.work_s
        least = min(least, job.left_s - work_s)
    return least


def slack_together(jobs: Iterable[Due]) -> float:
    """Least slack of jobs that run at the same time, as texts in slots do."""
    return min((job.left_s - job.work_s for job in jobs), default=NO_WORK_S)
