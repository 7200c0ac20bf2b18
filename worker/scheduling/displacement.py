"""Chooses the rows that leave their slots for more urgent ones: a pure decision.

The youngest row of the least urgent class leaves, since it has done the least work. It waits then and is admitted again
later. It must not be displaced again before it has done some work: otherwise a steady flow of more urgent rows would
let it begin again and again, and never end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import BY_SHARE, SUSPECT, Rows, priority_of
from millstream.worker.scheduling.batcher import Row

PROGRESS = 16
"""Records that a row makes before it may be displaced, if it was displaced before or runs by the share of its class."""


class Candidate(NamedTuple):
    """A row that has a slot. `records`: made since it was admitted. `displaced`: it was displaced before.

    `proven`: the server has output of this run.
    """

    row: Row[Prepared]
    records: int
    displaced: bool
    proven: bool

    @property
    def may_leave(self) -> bool:
        """Whether a more urgent row may have its slot. A suspect keeps it until it is proven: others wait for that."""
        rank = self.row.urgency[0]
        if rank == SUSPECT:
            return self.proven
        return self.records >= PROGRESS or not (self.displaced or rank == BY_SHARE)


def displaced(candidates: Sequence[Candidate], claimants: Sequence[int]) -> Rows:
    """The rows that leave, so that each claimant has a slot that may have one.

    `claimants`: for each row that waits without a free slot, the lowest position in PRIORITIES that it may displace.
    """
    order = sorted((each.row for each in candidates if each.may_leave), key=lambda row: (priority_of(row), _age(row)))
    leaving: Rows = []
    for floor in claimants:
        # A claimant behind this one may have a lower floor.
        if order and priority_of(order[-1]) >= floor:
            leaving.append(order.pop())
    return leaving


def _age(row: Row[Prepared]) -> tuple[int, ...]:
    """Order of arrival, without the rank."""
    return row.urgency[1:]
