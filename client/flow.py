"""Flow control of one call: computes how many jobs it keeps in flight. Pure; times are in seconds of any one clock."""

from __future__ import annotations

JOBS_PER_WORKER = 8
"""Jobs in flight for each live worker at most: one runs while the others are prepared or travel."""

LEAST_PER_WORKER = 2
"""Jobs in flight for each live worker at least, if answers are slow: one runs, one waits."""

HALF_LIFE_S = 10.0
"""Seconds after which the weight of an answer in the measured rate is halved."""


class Flow:
    """Measures how many jobs are answered per second and derives the window.

    `most` is the largest window. `answer_within_s` is the time limit of each job in seconds, None if there is none.
    `at_once` is the number of jobs that a worker runs at the same time: more than one if a job is a single row.
    """

    def __init__(self, most: int, answer_within_s: float | None, now: float, at_once: int = 1) -> None:
        self._most = most
        self._answer_within_s = answer_within_s
        self._others = at_once - 1
        self._answered = 0.0
        self._seconds = 0.0
        self._last = now

    def answered(self, now: float) -> None:
        """Counts one answered job at `now`."""
        passed = now - self._last
        keep = 0.5 ** (passed / HALF_LIFE_S)
        self._answered = self._answered * keep + 1
        self._seconds = self._seconds * keep + passed
        self._last = now

    def window(self, live_workers: int) -> int:
        """Returns the number of jobs to keep in flight.

        At most the number that is answered in half of a job's time limit (Little's law): if answers are slow, the jobs
        of a call must not wait behind each other until their deadlines are over.
        """
        jobs = (JOBS_PER_WORKER + self._others) * live_workers
        if self._answer_within_s is not None and self._seconds:
            in_time = int(self._answered / self._seconds * self._answer_within_s / 2)
            jobs = min(jobs, max((LEAST_PER_WORKER + self._others) * live_workers, in_time))
        return max(1, min(jobs, self._most))
