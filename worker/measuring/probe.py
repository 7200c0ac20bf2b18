"""What `max_batch_tokens: auto` comes to: the batch is doubled until this device gives no more for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from millstream.broker.config.load import Runtime, ServiceSpec
from millstream.broker.contract.errors import ModelUnavailable, described
from millstream.worker.measuring.warmup import sample
from millstream.worker.models.base import Model, Prepared
from millstream.worker.scheduling.memory import is_exhaustion

log = logging.getLogger(__name__)

PROBED = ("embedding", "reranker")
"""The types whose forward costs what its padded tokens do. Of others nothing is to be learned by doubling them."""

TYPICAL_TOKENS = 64
LEAST_TOKENS, MOST_TOKENS = 256, 16_384
GAIN = 1.05
"""What is not better by this factor is no better: a smaller batch answers sooner and pads less."""

FLAT_SIZES = 2
"""Sizes in a row without a gain that end it: one may be a chance of a busy machine."""

REPEATS = 3
FORWARD_S, PROBE_S = 1.0, 5.0
"""No forward starts that is predicted to take longer, nor one that would end later."""

Clock = Callable[[], float]


def auto_tokens(spec: ServiceSpec, model: Model) -> int | None:
    """What `auto` comes to for `spec` on the device of `model`; None where it is not asked for, or not to be measured.

    Raises ModelUnavailable where not even the smallest batch runs.
    """
    if spec.runtime.max_batch_tokens != "auto" or spec.model.type not in PROBED:
        return None
    return probe(model, spec.runtime.batch_size)


def most_tokens(runtime: Runtime, measured: int | None = None) -> int:
    """The most padded tokens of a forward by `runtime`; `measured` is what `auto` came to here, if it was measured."""
    return measured if measured and runtime.max_batch_tokens == "auto" else runtime.batch_tokens


def probe(model: Model, most_rows: int, clock: Clock = time.perf_counter) -> int:
    """The fewest padded tokens with which a forward gives within 5 % of the most tokens a second.

    A batch has rows of a typical length, at most `most_rows`, and from there on longer ones. Ends after PROBE_S and the
    forward under way; a size that has no room in memory bounds it. Raises ModelUnavailable.
    """
    # The first forward loads what all others find loaded.
    _seconds(model, [sample(model, TYPICAL_TOKENS)], 0.0, clock)
    began = clock()
    rates: dict[int, float] = {}
    best = predicted_s = 0.0
    flat = 0
    for rows in _doubling(model, most_rows):
        left_s = PROBE_S - (clock() - began)
        if predicted_s > min(FORWARD_S, left_s):
            break
        tokens = rows[0].tokens * len(rows)
        seconds = _seconds(model, rows, min(FORWARD_S, left_s), clock)
        if seconds is None:
            log.info("a forward of %d padded tokens is out of memory: batches stay below", tokens)
            break
        rates[tokens] = tokens / max(seconds, 1e-9)
        flat = 0 if rates[tokens] > GAIN * best else flat + 1
        best, predicted_s = max(best, rates[tokens]), 2 * seconds
        if flat == FLAT_SIZES:
            break
    if not rates:
        raise ModelUnavailable(
            f"not even {LEAST_TOKENS} padded tokens have room in memory", hint="use another device, or smaller weights"
        )
    return min(tokens for tokens, rate in rates.items() if GAIN * rate >= best)


def _doubling(model: Model, most_rows: int) -> Iterator[list[Prepared]]:
    """Batches of twice the tokens each time, as far as rows and the model's longest text allow."""
    typical = sample(model, TYPICAL_TOKENS).tokens
    before, tokens = 0, LEAST_TOKENS
    while tokens <= MOST_TOKENS:
        count = max(1, min(most_rows, tokens // typical))
        row = sample(model, tokens // count)
        if row.tokens * count <= before:
            return
        yield [row] * count
        before, tokens = row.tokens * count, 2 * tokens


def _seconds(model: Model, rows: list[Prepared], within_s: float, clock: Clock) -> float | None:
    """Of the fastest of a few forwards, as many as `within_s` has room for; None where one has no room in memory."""
    began = clock()
    best = float("inf")
    for _ in range(REPEATS):
        start = clock()
        try:
            run(model, rows)
        except MemoryError:
            return None
        best = min(best, clock() - start)
        if clock() - began + best > within_s:
            break
    return best


def run(model: Model, rows: Sequence[Prepared]) -> None:
    """Raises MemoryError where there is too little memory, ModelUnavailable for any other fault."""
    try:
        model.forward(rows)
    except Exception as error:
        if is_exhaustion(error):
            raise MemoryError(str(error)) from error
        raise ModelUnavailable(f"the model fails in its warm-up: {described(error)}") from error
