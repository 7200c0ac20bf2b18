"""Keeps less urgent jobs from starving while more urgent ones saturate the workers: a pure deficit count, in rows.

After deficit round robin (Shreedhar and Varghese, 1995): a waiting class saves its share of all claimed rows, and may
run as many rows as it saved before more urgent classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millstream.broker.contract.job import PRIORITIES, Claim, Priority

CLASSES = (Priority.NORMAL, Priority.BATCH)
"""Classes that can starve; realtime jobs run first."""

SAVED_BATCHES = 2
"""Micro-batches of rows that a class may save at most."""


class FairShare:
    """Saved rows of one worker. `shares` are parts of 1; `most_rows` bounds how long a class delays urgent ones."""

    def __init__(self, shares: Mapping[Priority, float], most_rows: int) -> None:
        self._saved = dict.fromkeys(CLASSES, 0.0)
        self.change(shares, most_rows)

    def change(self, shares: Mapping[Priority, float], most_rows: int) -> None:
        """Applies changed limits."""
        self._shares = shares
        self._most_rows = most_rows

    def saved(self) -> tuple[int, int]:
        """Rows that normal and batch jobs may run before more urgent ones."""
        normal, batch = (int(self._saved[each]) for each in CLASSES)
        return normal, batch

    def charge(self, priority: Priority, rows: int) -> None:
        """Charges `rows` that were claimed before and run now, before more urgent ones."""
        self._saved[priority] = max(0.0, self._saved[priority] - rows * (1 - self._shares[priority]))

    def record(self, claims: Sequence[Claim], waiting: Sequence[int]) -> None:
        """Notes the claimed jobs, and how many of each priority still wait, in the streams or in the window."""
        rows = dict.fromkeys(PRIORITIES, 0)
        for claim in claims:
            rows[claim.address.priority] += claim.job.rows if claim.job else 1
        total = sum(rows.values())
        for each in CLASSES:
            if not waiting[PRIORITIES.index(each)]:
                self._saved[each] = 0.0
            else:
                earned = self._saved[each] + self._shares[each] * total - rows[each]
                self._saved[each] = min(float(self._most_rows), max(0.0, earned))
