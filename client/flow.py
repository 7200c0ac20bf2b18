"""How many jobs one call keeps in flight: a pure rule over its answers, times in seconds of any one clock."""

from __future__ import annotations

JOBS_PER_WORKER = 8
"""Jobs in flight for each live worker: one runs, and the others are prepared or on their way meanwhile."""

LEAST_PER_WORKER = 2
"""Also if answers are slow: one runs, one waits."""

HALF_LIFE_S = 10.0
"""Seconds after which an answer counts half as much for the rate."""


class Flow:
    """Learns how many jobs are answered a second. `answer_within` is the time each job has, None if it has no limit."""

    def __init__(self, most: int, answer_within_s: float | None, now: float) -> None:
        self._most = most
        self._answer_within_s = answer_within_s
        self._answered = 0.0
        self._seconds = 0.0
        self._last = now

    def answered(self, now: float) -> None:
        """One more job was answered."""
        passed = now - self._last
        keep = 0.5 ** (passed / HALF_LIFE_S)
        self._answered = self._answered * keep + 1
        self._seconds = self._seconds * keep + passed
        self._last = now

    def window(self, live_workers: int) -> int:
        """Jobs to keep in flight.

        At most what is answered in half of the time that a job has (Little's law): a call whose forwards are slow must
        not let its own jobs wait behind one another until their time is over.
        """
        jobs = JOBS_PER_WORKER * live_workers
        if self._answer_within_s is not None and self._seconds:
            in_time = int(self._answered / self._seconds * self._answer_within_s / 2)
            jobs = min(jobs, max(LEAST_PER_WORKER * live_workers, in_time))
        return max(1, min(jobs, self._most))
