"""What a worker process counts of its own work; published at each beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the process started. `padded` / `tokens` is the padding; `rows` / `forwards` the mean batch."""

    jobs: int = 0
    rows: int = 0
    forwards: int = 0
    tokens: int = 0
    padded: int = 0
    errors: int = 0
    late: int = 0
    busy_ms: int = 0

    def fields(self) -> dict[str, str | int]:
        return dict(asdict(self))
