"""Chooses the lane that gets the device next, if one process hosts several: a pure decision, with the time as argument.

The lane whose jobs may wait least comes first, by their deadlines and targets and by measured times; see slack.py. A
lane is late if its slack is shorter than a turn that another lane may begin now. Late lanes come before the others: the
more urgent jobs first, then the model whose `priority` is the smaller number, then the lane that was served least
recently. A late lane with less urgent jobs comes first when it has waited for WAIT_FACTOR times the length of its last
turn. So it gets about a tenth of the device's time, however much urgent work the other lanes have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WAIT_FACTOR = 9.0
"""Length of a lane's last turn times this: seconds after which a late lane goes before more urgent lanes."""


class Work(NamedTuple):
    """Work of one lane. `rank`: position in PRIORITIES of its most urgent row.

    `slack_s`: seconds that its jobs may still wait, below 0 if one will be late. `order`: its model's `priority`.
    """

    rank: int
    slack_s: float
    order: float = 0.0


@dataclass(slots=True)
class _Lane:
    """`waits_since`: monotonic seconds since which it has work and no turn, None if it has no work.

    `turn_s`: seconds of its last turn. `served`: number of that turn, 0 before the first one.
    """

    waits_since: float | None = None
    turn_s: float = 0.0
    served: int = 0

    def is_due(self, now: float) -> bool:
        return self.waits_since is not None and now - self.waits_since > WAIT_FACTOR * self.turn_s


class DeviceTurn:
    """The turns of `count` lanes, which are named by their positions."""

    def __init__(self, count: int) -> None:
        self._lanes = [_Lane() for _ in range(count)]
        self._turns = 0

    def next(self, works: Sequence[Work | None], now: float) -> int | None:
        """The lane that gets the device at `now`, monotonic seconds; None if no lane has work.

        `works`: by lane; None if it has no work.
        """
        for lane, work in zip(self._lanes, works, strict=True):
            if work is None:
                lane.waits_since = None
            elif lane.waits_since is None:
                lane.waits_since = now
        order = [(self._key(place, work, works, now), place) for place, work in enumerate(works) if work is not None]
        return min(order)[-1] if order else None

    def _key(self, place: int, work: Work, works: Sequence[Work | None], now: float) -> tuple[float, ...]:
        lane = self._lanes[place]
        others = (each.turn_s for at, each in enumerate(self._lanes) if at != place and works[at] is not None)
        if work.slack_s >= max(others, default=0.0):
            return (2, work.slack_s, work.order, lane.served)
        if lane.is_due(now):
            return (0, 0, 0, lane.served)
        return (1, work.rank, work.order, lane.served)

    def end(self, place: int, seconds: float, now: float) -> None:
        """Notes that the lane at `place` had a turn of `seconds`, which ended at `now`, monotonic seconds."""
        self._turns += 1
        lane = self._lanes[place]
        lane.served, lane.turn_s = self._turns, seconds
        # Whether it still has work is seen at the next choice.
        lane.waits_since = now if lane.waits_since is not None else None
