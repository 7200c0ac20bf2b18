"""Totals of one service, as callers see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from millstream.broker.contract.job import Priority
from millstream.broker.queue.metrics import ServiceMetrics


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """Totals of one service, over all of its clients and workers, until 30 days after the last worker's end.

    `rows` ran in `batches`: forwards of the model. Exact are the rows that were answered, `ok`, and `failed`, by error
    code, and the calls that were `refused`, by reason, each once however often it was sent again. `cached`: rows that
    clients found in the cache, at most a second late. `sizes`: jobs in the queue now, waiting or running, by priority.
    """

    batches: int
    rows: int
    sizes: Mapping[Priority, int]
    refused: Mapping[str, int]
    ok: int
    failed: Mapping[str, int]
    cached: int

    @property
    def average_batch(self) -> float | None:
        """Mean rows of a batch; None before the first."""
        return self.rows / self.batches if self.batches else None

    @classmethod
    def of(cls, totals: ServiceMetrics, sizes: Mapping[Priority, int]) -> ServiceStats:
        """Returns the totals that callers see, and the `sizes` of the queue."""
        work = totals.work
        return cls(work["forwards"], work["rows"], sizes, totals.refused, totals.ok, totals.failed, totals.cached)
