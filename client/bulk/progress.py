"""Progress of a bulk run, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """State of a bulk run whose results are in `output`.

    `rows` have a result or an error, `failed` of them an error; `share` of the input was read for them, 0 to 1. Results
    of the last ones may not be written yet. `rate` is in rows
    a second, of this process; `eta_s` are seconds until the end at that rate, None if there is no rate yet.
    """

    output: Path
    rows: int
    failed: int
    share: float
    rate: float = 0.0
    eta_s: float | None = None
    workers: int = 0


class Pace:
    """Computes the progress of a process that began `share` of the input, at `began`, monotonic seconds."""

    def __init__(self, output: Path, rows: int, share: float, began: float) -> None:
        self._output, self._rows, self._share, self._began = output, rows, share, began

    def measure(self, rows: int, failed: int, share: float, workers: int, now: float) -> BulkProgress:
        """Returns the progress at `now`, monotonic seconds."""
        seconds, gained = max(1e-9, now - self._began), share - self._share
        eta_s = (1.0 - share) * seconds / gained if gained > 0 else None
        return BulkProgress(self._output, rows, failed, share, (rows - self._rows) / seconds, eta_s, workers)
