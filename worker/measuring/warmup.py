"""The first forwards: they load kernels and memory, and measure what a forward and a token cost on this device."""

from __future__ import annotations

import time

from millstream.broker.contract.errors import MillstreamError, ModelUnavailable, described
from millstream.worker.models.base import Model, Prepared
from millstream.worker.window import Window

SHORT_TOKENS = 16
LONG_TOKENS = 128
REPEATS = 2
LEAST_OVERHEAD = 64.0
"""Tokens. Below it a CPU measures no gain from cutting finer, and batches only get smaller."""


def warm_up(model: Model, window: Window) -> None:
    """Run the smallest and the largest batch, and set the window's cost of a forward and of a token by them.

    A model without samples is left to learn from its first jobs. Raises ModelUnavailable where it cannot run its own
    warm-up.
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
    """A row of about `tokens` tokens, ready to run. Raises ModelUnavailable where the model refuses its own samples."""
    samples = model.samples(tokens)
    if not samples:
        raise ModelUnavailable("the model has no sample to measure with")
    row = model.prepare(samples, model.sample_options)[0]
    if isinstance(row, MillstreamError):
        raise ModelUnavailable(f"the model refuses its own warm-up: {row}")
    return row


def _seconds(model: Model, rows: list[Prepared]) -> float:
    """Of the fastest of a few forwards."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        try:
            model.forward(rows)
        except Exception as error:
            raise ModelUnavailable(f"the model fails in its warm-up: {described(error)}") from error
        best = min(best, time.perf_counter() - start)
    return best
