"""The rows that an engine holds, and their jobs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from millstream.worker.scheduling.active_job import ActiveJob, Rows
from millstream.worker.supervision.progress import Stage, Track

Jobs = dict[str, ActiveJob]
"""Jobs by name."""


class Running:
    """Rows in the engine; for the runner's thread. The page names their jobs, to which a death is charged.

    `records`: number of records that a row made since it was admitted, by its id; rows without a record are missing.
    """

    def __init__(self, track: Track) -> None:
        self._track = track
        self.rows: Rows = []
        self.jobs: Jobs = {}
        self.records: dict[int, int] = {}

    def add(self, rows: Rows, jobs: Jobs, now: int) -> None:
        """Adds rows that start at `now`, server ms."""
        start, size = time.monotonic(), len(self.rows) + len(rows)
        for job in jobs.values():
            job.started_at = job.started_at or now
            job.batch = job.batch or size
            job.running_since = start
        self.rows = [*self.rows, *rows] if self.rows else rows
        self.jobs.update(jobs)

    def remove(self, rows: Rows) -> list[str]:
        """Removes rows that left the engine. Returns the names of the jobs without rows in it."""
        now = time.monotonic()
        if len(rows) == len(self.rows):
            ended, self.jobs, self.rows = self.jobs, {}, []
            self.records.clear()
        else:
            gone = set(map(id, rows))
            self.rows = [row for row in self.rows if id(row) not in gone]
            self.records = {each: count for each, count in self.records.items() if each not in gone}
            owners = {row.owner for row in self.rows}
            ended = {name: job for name, job in self.jobs.items() if name not in owners}
            self.jobs = {name: job for name, job in self.jobs.items() if name in owners}
        for job in ended.values():
            job.pause(now)
        return list(ended)

    def note_records(self, rows: Iterable[int]) -> None:
        """Notes that the rows with these ids have each made a record."""
        for row in rows:
            self.records[row] = self.records.get(row, 0) + 1

    def show(self) -> None:
        """Puts the jobs on the page, or clears it if there are none."""
        if self.rows:
            self._track.start(self.jobs, Stage.RUN)
        else:
            self._track.stop()

    def pause(self) -> None:
        """Counts no time for the jobs from now on, and charges no death to them."""
        now = time.monotonic()
        for job in self.jobs.values():
            job.pause(now)
        self._track.stop()

    def resume(self) -> None:
        """Counts time again, and puts the jobs on the page."""
        now = time.monotonic()
        for job in self.jobs.values():
            job.running_since = now
        self.show()
