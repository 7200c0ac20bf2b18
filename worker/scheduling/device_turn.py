"""Chooses the lane that gets the device next, if one process hosts several: a pure decision, with the time as argument.

The most urgent work comes first; among equals, the lane that was served least recently. A lane with less urgent work is
due when it has waited for WAIT_FACTOR times the length of its last turn. So it gets about a tenth of the device's time,
however much urgent work the other lanes have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WAIT_FACTOR = 9.0
"""Length of a lane's last turn times this: seconds after which it goes before more urgent lanes."""


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

    def next(self, urgencies: Sequence[int | None], now: float) -> int | None:
        """The lane that gets the device at `now`, monotonic seconds; None if no lane has work.

        `urgencies`: by lane, position in PRIORITIES of its most urgent row; None if it has no work.
        """
        for lane, urgency in zip(self._lanes, urgencies, strict=True):
            if urgency is None:
                lane.waits_since = None
            elif lane.waits_since is None:
                lane.waits_since = now
        order = [
            (not lane.is_due(now), 0 if lane.is_due(now) else urgency, lane.served, place)
            for place, (lane, urgency) in enumerate(zip(self._lanes, urgencies, strict=True))
            if urgency is not None
        ]
        return min(order)[-1] if order else None

    def end(self, place: int, seconds: float, now: float) -> None:
        """Notes that the lane at `place` had a turn of `seconds`, which ended at `now`, monotonic seconds."""
        self._turns += 1
        lane = self._lanes[place]
        lane.served, lane.turn_s = self._turns, seconds
        # Whether it still has work is seen at the next choice.
        lane.waits_since = now if lane.waits_since is not None else None
