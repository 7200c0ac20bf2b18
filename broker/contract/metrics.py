"""Names of a service's counters and histograms in its hash `metrics`, and the buckets of the histograms. Pure.

A counter is one field, and so is one that has a label, as NAME:LABEL. A histogram has a field for each bucket, as
NAME:UPPER BOUND, one for larger values, NAME:more, and NAME:sum. All values are whole numbers: sums are in thousandths
of the histogram's unit. Labels are priorities, reasons and error codes, never ids, so their number is limited.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

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


class Histogram:
    """Counts of values by bucket since the process started. For one thread that observes, and others that read."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Does as `observe` for each value, in half the time."""
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)
