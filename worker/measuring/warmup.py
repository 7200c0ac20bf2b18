"""Runs the first forwards, which load kernels and memory, and measures the cost of a forward and of a token."""

from __future__ import annotations

import time

from millstream.broker.contract.errors import MillstreamError, ModelUnavailable, described
from millstream.worker.models.base import Model, Prepared
from millstream.worker.window import Window

SHORT_TOKENS = 16
LONG_TOKENS = 128
"""Tokens of a row in the smallest and in the largest batch."""

REPEATS = 2
"""Forwards of each batch; the fastest counts."""

LEAST_OVERHEAD = 64.0
"""Least fixed cost of a forward, in tokens. With less, batches get smaller, which gained nothing on a CPU."""


def warm_up(model: Model, window: Window) -> None:
    """Runs the smallest and the largest batch, and sets the window's cost of a forward and of a token by them.

    If a model has no samples, nothing is run; its first jobs set the cost. Raises ModelUnavailable if it fails.
    """
    if not model.samples(SHORT_TOKENS):
        return
    budget = window.budget
    short = sample(model, SHORT_TOKENS)
    long = sample(model, min(LONG_TOKENS, budget.tokens))
    rows = max(2, min(budget.rows, budget.tokens // long.tokens))
    short_s, long_s = _seconds(model, [short]), _seconds(model, [long] * rows)
    grown = rows * long.tokens - short.tokens
    token_s = max((long_s - short_s) / grown, 1e-9)
    overhead = max(LEAST_OVERHEAD, min(budget.tokens, short_s / token_s - short.tokens))
    window.cost.calibrate(token_s, overhead, short_s)


def sample(model: Model, tokens: int) -> Prepared:
    """A prepared row of about `tokens` tokens. Raises ModelUnavailable if the model has no samples or refuses them."""
    samples = model.samples(tokens)
    if not samples:
        raise ModelUnavailable("the model has no sample to measure with")
    row = model.prepare(samples, model.sample_options)[0]
    if isinstance(row, MillstreamError):
        raise ModelUnavailable(f"the model refuses its own warm-up: {row}")
    return row


def _seconds(model: Model, rows: list[Prepared]) -> float:
    """Seconds of the fastest of REPEATS forwards."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        try:
            model.forward(rows)
        except Exception as error:
            raise ModelUnavailable(f"the model fails in its warm-up: {described(error)}") from error
        best = min(best, time.perf_counter() - start)
    return best
