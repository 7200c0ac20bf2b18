"""Measures a value for `max_batch_tokens: auto`: doubles the batch until this device gets no faster."""

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

TYPICAL_TOKENS = 64
"""Tokens of a row in a measured batch, as long as `batch_size` allows enough rows."""

LEAST_TOKENS, MOST_TOKENS = 256, 16_384
"""Padded tokens of the smallest and of the largest batch."""

GAIN = 1.05
"""Factor by which a larger batch must be faster to be preferred: a smaller one answers sooner and pads less."""

FLAT_SIZES = 2
"""Sizes in a row without a gain after which the probe ends. A single one may be due to a busy machine."""

REPEATS = 3
"""Forwards of each size; the fastest counts."""

FORWARD_S, PROBE_S = 1.0, 5.0
"""Seconds: the longest predicted forward that starts, and the whole probe."""

Clock = Callable[[], float]


def auto_tokens(spec: ServiceSpec, model: Model) -> int | None:
    """Padded tokens measured for `auto` on the device of `model`; None if `spec` sets a number or cannot be measured.

    Raises ModelUnavailable if not even the smallest batch runs.
    """
    if spec.runtime.max_batch_tokens != "auto" or not spec.model.operation.one_forward:
        return None
    return probe(model, spec.runtime.batch_size)


def most_tokens(runtime: Runtime, measured: int | None = None) -> int:
    """Most padded tokens of a forward by `runtime`; `measured`: the result of `auto_tokens` on this device."""
    return measured if measured and runtime.max_batch_tokens == "auto" else runtime.batch_tokens


def probe(model: Model, most_rows: int, clock: Clock = time.perf_counter) -> int:
    """The fewest padded tokens with which a forward is within 5 % of the highest rate of tokens a second.

    A batch has rows of a typical length, up to `most_rows`; larger batches have longer rows. Ends after PROBE_S seconds
    and the running forward, or at a size that does not fit into memory. Raises ModelUnavailable.
    """
    # The first forward loads kernels and memory; the others find them loaded.
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
            log.info("a forward of %d padded tokens ran out of memory: batches stay below that", tokens)
            break
        rates[tokens] = tokens / max(seconds, 1e-9)
        flat = 0 if rates[tokens] > GAIN * best else flat + 1
        best, predicted_s = max(best, rates[tokens]), 2 * seconds
        if flat == FLAT_SIZES:
            break
    if not rates:
        raise ModelUnavailable(
            f"not even {LEAST_TOKENS} padded tokens fit into memory", hint="use another device, or smaller weights"
        )
    return min(tokens for tokens, rate in rates.items() if GAIN * rate >= best)


def _doubling(model: Model, most_rows: int) -> Iterator[list[Prepared]]:
    """Yields batches, each with twice the tokens of the last, as far as `most_rows` and the longest text allow."""
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
    """Seconds of the fastest of a few forwards that fit into `within_s`; None if one runs out of memory."""
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
    """Runs one forward. Raises MemoryError if it runs out of memory, ModelUnavailable for any other fault."""
    try:
        model.forward(rows)
    except Exception as error:
        if is_exhaustion(error):
            raise MemoryError(str(error)) from error
        raise ModelUnavailable(f"the model fails in its warm-up: {described(error)}") from error
