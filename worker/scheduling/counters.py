"""Counters of a worker process; published at each beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import get_args

from millstream.broker.contract.metrics import WORK
from millstream.worker.scheduling.batcher import Cut


@dataclass(slots=True)
class Counters:
    """Totals since the process started. `padded` / `tokens` is the padding, `rows` / `forwards` the mean batch.

    `padded`: computed tokens, padding included; `padding_tokens`: those beside the tokens of rows. `late`: answers to
    jobs that were settled before. `cuts`: forwards by the reason why their micro-batch had no more rows. Of answered
    jobs: `tokens_in` of inputs, `tokens_out` of texts, `tokens_reused` of prompts that were computed before.
    """

    jobs: int = 0
    rows: int = 0
    forwards: int = 0
    tokens: int = 0
    padded: int = 0
    padding_tokens: int = 0
    errors: int = 0
    late: int = 0
    busy_ms: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_reused: int = 0
    cuts: dict[Cut, int] = field(default_factory=lambda: dict.fromkeys(get_args(Cut), 0))

    def fields(self) -> dict[str, str | int]:
        """All counters by the name under which they are published."""
        totals = asdict(self)
        cuts = {f"cut_{reason}": count for reason, count in totals.pop("cuts").items()}
        return totals | cuts

    def work(self) -> dict[str, int]:
        """The counters that are added to the metrics of the service, by field."""
        return {f"work:{name}": getattr(self, name) for name in WORK}
