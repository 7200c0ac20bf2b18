"""Names of a service's counters and histograms in its hash `metrics`, and the buckets of the histograms. Pure.

A counter is one field, and so is one that has a label, as NAME:LABEL. A histogram has a field for each bucket, as
NAME:UPPER BOUND, one for larger values, NAME:more, and NAME:sum. All values are whole numbers: sums are in thousandths
of the histogram's unit. Labels are priorities, reasons and error codes, never ids, so their number is limited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from millstream.broker.contract.job import PRIORITIES

TIMES_MS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5)
"""Upper bounds of the buckets of times, ms."""

_FINE_MS = tuple(round(1.1**step, 2) for step in range(133))
"""Upper bounds of finer buckets of times, ms: each is a tenth above the one before, up to 5 minutes."""

_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_TOKENS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
_AGREEMENT = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_PADDING = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)

HISTOGRAMS: Mapping[str, Sequence[float]] = {
    **{f"wait:{priority}": TIMES_MS for priority in PRIORITIES},
    **{f"total:{priority}": TIMES_MS for priority in PRIORITIES},
    "latency": _FINE_MS,
    "inference": TIMES_MS,
    "first_token": TIMES_MS,
    "between_tokens": TIMES_MS,
    "batch_rows": _ROWS,
    "batch_tokens": _TOKENS,
    "padding": _PADDING,
    "shadow_agreement": _AGREEMENT,
    "shadow_latency": TIMES_MS,
}
"""Upper bounds of the buckets of each histogram, in its unit. A value is in the first bucket that it does not exceed.

`wait` (accepted to its first forward), `total` (accepted to settled), `inference` (in the model), in ms, of jobs that
ran; `latency`: `total` of all priorities, in buckets that are fine enough to compare versions; `first_token` (accepted
to its first text) and `between_tokens`, in ms, of texts that grow; `batch_rows`, `batch_tokens` (padding included) and
`padding` (computed tokens for each token of the inputs) of forwards. Clients add `shadow_agreement` (see
client/shadow_agreement.py) and `shadow_latency` (sent to answered, in ms) of shadows.
"""

WORK = ("forwards", "rows", "tokens", "padding_tokens", "busy_ms", "late", "tokens_in", "tokens_out", "tokens_reused")
"""Counters that workers add with their heartbeat, as `work:NAME`.

`rows` and `tokens` of all `forwards`; `padding_tokens`: computed beside them; `busy_ms`: of forwards; `late`: answers
to jobs that were settled before. Of answered jobs: `tokens_in` of inputs, `tokens_out` of generated texts,
`tokens_reused` of prompts that were computed before.
"""

ShadowEnd = Literal["compared", "failed", "dropped"]

SHADOW_ENDS: tuple[ShadowEnd, ...] = get_args(ShadowEnd)
"""Ends of a shadow, which clients count as `shadow:END`. Dropped: the client had too many, or the queue refused it."""

THOUSAND = 1000
"""Factor of a histogram's sum in its field."""


def bucket_fields(name: str) -> list[str]:
    """Returns the fields of a histogram's buckets, the one of larger values last."""
    return [*(f"{name}:{bound:g}" for bound in HISTOGRAMS[name]), f"{name}:more"]


def sum_field(name: str) -> str:
    """Returns the field of the sum of a histogram's values."""
    return f"{name}:sum"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values by bucket, and the sum of the values. `counts` has one more than `bounds`, of larger values."""

    bounds: NDArray[np.float64]
    counts: NDArray[np.int64]
    total: float = 0.0

    @classmethod
    def empty(cls, bounds: Sequence[float]) -> Histogram:
        """Returns one without values."""
        return cls(np.array(bounds, np.float64), np.zeros(len(bounds) + 1, np.int64))

    def plus(self, values: NDArray[np.float64]) -> Histogram:
        """Returns it with `values` added."""
        found = np.bincount(self.bounds.searchsorted(values), minlength=len(self.counts))
        return Histogram(self.bounds, self.counts + found, self.total + float(values.sum()))

    def merged(self, other: Histogram) -> Histogram:
        """Returns it with the values of another one that has the same bounds."""
        return Histogram(self.bounds, self.counts + other.counts, self.total + other.total)


def fields_of(name: str, histogram: Histogram) -> dict[str, int]:
    """Returns the fields of histogram `name` that are not zero."""
    fields = [*zip(bucket_fields(name), histogram.counts.tolist(), strict=True)]
    return {field: count for field, count in [*fields, (sum_field(name), round(histogram.total * THOUSAND))] if count}
