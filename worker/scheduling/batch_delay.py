"""Whether an idle model should wait for company: a pure rule over arrival times, seconds of any one clock.

A lone caller's next request comes only after its answer, so waiting for it is waiting for nothing. What counts is how
often a job arrives while another one is in hand: that rate says whether company is likely.
"""

from __future__ import annotations

HALF_LIFE_S = 2.0
MIN_ARRIVALS = 0.5


class BatchDelay:
    """Learns the rate of arrivals while others are in hand, and from it how long to wait."""

    def __init__(self, batch_timeout_s: float) -> None:
        self.batch_timeout_s = batch_timeout_s
        self._arrivals = 0.0
        self._busy_s = 0.0

    def observe(self, arrivals: int, busy_s: float) -> None:
        """`arrivals` jobs came in `busy_s` seconds during which at least one other was in hand."""
        keep = 0.5 ** (busy_s / HALF_LIFE_S)
        self._arrivals = self._arrivals * keep + arrivals
        self._busy_s = self._busy_s * keep + busy_s

    def wait_s(self, since_first_s: float, since_last_s: float = 0.0) -> float:
        """How much longer to wait for one more job, so long after the first one and the last one; 0 means run now."""
        remaining_s = self.batch_timeout_s - since_first_s
        if remaining_s <= 0 or self._arrivals < MIN_ARRIVALS:
            return 0.0
        gap = self._busy_s / self._arrivals
        # Worth it only if one more is likely in the time left; and not longer than twice what is usual.
        return max(0.0, min(remaining_s, 2 * gap - since_last_s)) if gap <= remaining_s else 0.0

    def note_failed_wait(self) -> None:
        """The wait ended without a second job. Traffic may have dropped, so past arrivals weigh a quarter."""
        self._arrivals /= 4
        self._busy_s /= 4
