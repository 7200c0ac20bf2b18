"""Counters of a worker process; published at each beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import get_args

from millstream.worker.scheduling.batcher import Cut


@dataclass(slots=True)
class Counters:
    """Totals since the process started. `padded` / `tokens` is the padding, `rows` / `forwards` the mean batch.

    `padded`: computed tokens, padding included. `late`: answers to jobs that were settled before. `cuts`: forwards by
    the reason why their micro-batch had no more rows.
    """

    jobs: int = 0
    rows: int = 0
    forwards: int = 0
    tokens: int = 0
    padded: int = 0
    errors: int = 0
    late: int = 0
    busy_ms: int = 0
    cuts: dict[Cut, int] = field(default_factory=lambda: dict.fromkeys(get_args(Cut), 0))

    def fields(self) -> dict[str, str | int]:
        """All counters by the name under which they are published."""
        totals = asdict(self)
        cuts = {f"cut_{reason}": count for reason, count in totals.pop("cuts").items()}
        return totals | cuts
