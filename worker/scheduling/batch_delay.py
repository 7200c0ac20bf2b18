"""Decides if an idle model should wait for more jobs: a pure rule over arrival times, in seconds of any one clock.

A single caller sends its next request only after its answer, so waiting for it is useless. The rule uses the rate of
jobs that arrive while another one waits or runs: it says how likely a second job is.
"""

from __future__ import annotations

HALF_LIFE_S = 2.0
"""Busy seconds after which an arrival weighs half."""

MIN_ARRIVALS = 0.5
"""Weighted arrivals below which the rule never waits."""


class BatchDelay:
    """Estimates the rate of arrivals in busy time, and from it how long to wait. `batch_timeout_s`: longest wait."""

    def __init__(self, batch_timeout_s: float) -> None:
        self.batch_timeout_s = batch_timeout_s
        self._arrivals = 0.0
        self._busy_s = 0.0

    def observe(self, arrivals: int, busy_s: float) -> None:
        """Notes that `arrivals` jobs came in `busy_s` seconds during which at least one other job waited or ran."""
        keep = 0.5 ** (busy_s / HALF_LIFE_S)
        self._arrivals = self._arrivals * keep + arrivals
        self._busy_s = self._busy_s * keep + busy_s

    def wait_s(self, since_first_s: float, since_last_s: float = 0.0) -> float:
        """Seconds to wait for one more job, by the time since the first and the last one; 0.0: run now."""
        remaining_s = self.batch_timeout_s - since_first_s
        if remaining_s <= 0 or self._arrivals < MIN_ARRIVALS:
            return 0.0
        gap = self._busy_s / self._arrivals
        # Wait only if one more job is likely in the remaining time, and at most twice the mean gap between arrivals.
        return max(0.0, min(remaining_s, 2 * gap - since_last_s)) if gap <= remaining_s else 0.0

    def note_failed_wait(self) -> None:
        """Notes that a wait ended without a second job. Traffic may have dropped, so past arrivals weigh a quarter."""
        self._arrivals /= 4
        self._busy_s /= 4
