"""Measures batch limits on this device: runs each of a grid over the same rows, batched as a worker batches them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, product

from millstream.broker.contract.errors import MillstreamError
from millstream.worker.measuring.probe import GAIN, Clock, run
from millstream.worker.measuring.warmup import sample
from millstream.worker.models.base import Model, Prepared
from millstream.worker.scheduling.batcher import Budget, Pool, Row, computed
from millstream.worker.window import Window

BATCH_SIZES = (8, 16, 32, 64, 128)
TOKENS = (512, 1_024, 2_048, 4_096, 8_192, 16_384)
"""Limits of rows and of padded tokens in the grid."""

LEAST_OF_TOKENS = 2
"""Number of TOKENS to measure on every device; larger ones only if a forward is predicted to take FORWARD_S at most."""

FORWARD_S = 2.0
"""Seconds."""

ROUNDS = 3
"""Rates measured for each cell, at most."""

SEED = 7
ROWS = 1_024
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 52, 0.7, 512
"""The mix has log-normal lengths, cut at MOST_TOKENS and at the longest text of the model."""


@dataclass(slots=True, eq=False)
class Cell:
    """One pair of limits: the micro-batches of all rows by them, and the measurements.

    `padding`: computed tokens / tokens. `rates`: rows a second, one for each round. `no_room`: a forward ran out of
    memory.
    """

    budget: Budget
    batches: Sequence[Sequence[Prepared]]
    padding: float
    rates: list[float] = field(default_factory=list)
    no_room: bool = False

    @property
    def rate(self) -> float:
        """Rows a second, the median of the rounds; 0.0 before the first."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))

    @property
    def rows_per_forward(self) -> float:
        return self.rows / len(self.batches)

    @property
    def forward_s(self) -> float:
        """Mean seconds of a forward; 0.0 before the first round."""
        return self.rows_per_forward / self.rate if self.rate else 0.0


def mix(model: Model, count: int = ROWS) -> list[Prepared]:
    """Rows of a long-tailed mix of lengths; equal at each call."""
    rng = random.Random(SEED)
    lengths = [min(MOST_TOKENS, max(1, round(MEDIAN_TOKENS * rng.lognormvariate(0, SPREAD)))) for _ in range(count)]
    by_length = {length: sample(model, length) for length in set(lengths)}
    return [by_length[length] for length in lengths]


def rows_of(model: Model, texts: Sequence[str]) -> tuple[list[Prepared], dict[int, MillstreamError]]:
    """Rows of `texts`, repeated up to about ROWS, and the error of each refused text by its index."""
    prepared = model.prepare(list(texts), model.sample_options)
    rows = [row for row in prepared if isinstance(row, Prepared)]
    refused = {at: row for at, row in enumerate(prepared) if isinstance(row, MillstreamError)}
    return rows * (-(-ROWS // len(rows)) if rows else 1), refused


def micro_batches(rows: Iterable[Prepared], window: Window) -> list[list[Prepared]]:
    """The micro-batches that a worker with `window`, which must be empty, makes of `rows`, waiting in this order."""
    room, pool, batches = window.room(1), Pool[Prepared](), list[list[Prepared]]()
    most_rows, most_tokens = (room.rows, room.tokens) if room else (1, 1)
    waiting = enumerate(rows)
    while True:
        while len(pool) < most_rows and pool.tokens < most_tokens and (following := next(waiting, None)):
            at, row = following
            pool.add([Row(row.tokens, (0, at), "", at, row)])
        if not len(pool):
            return batches
        batches.append([row.payload for row in pool.take(window.budget)])


def grid(rows: Sequence[Prepared], window: Window, own: Budget) -> list[Cell]:
    """The cells to measure, by tokens and rows: `own`, and others with distinct batches. `window` must be warmed up."""
    cost = window.cost.seconds_per_token
    fast_enough = [tokens for at, tokens in enumerate(TOKENS) if at < LEAST_OF_TOKENS or cost * tokens <= FORWARD_S]
    candidates = [Budget(*pair) for pair in product(BATCH_SIZES, fast_enough)]
    cells: dict[tuple[tuple[int, int], ...], Cell] = {}
    for limits in [own, *candidates]:
        cell = _cell(rows, window, limits)
        cells.setdefault(tuple((len(batch), _computed(batch, cell.budget)) for batch in cell.batches), cell)
    return sorted(cells.values(), key=lambda cell: (cell.budget.tokens, cell.budget.rows))


def _cell(rows: Sequence[Prepared], window: Window, limits: Budget) -> Cell:
    overhead = min(window.budget.overhead, limits.tokens)
    own = Window(replace(limits, overhead=overhead, packs=window.budget.packs))
    own.cost.seconds_per_token = window.cost.seconds_per_token
    batches = micro_batches(rows, own)
    real = sum(row.tokens for row in rows)
    return Cell(own.budget, batches, sum(_computed(batch, own.budget) for batch in batches) / real)


def measure(model: Model, cells: Sequence[Cell], seconds: float, clock: Clock = time.perf_counter) -> Iterator[Cell]:
    """Runs the cells in turn, for about `seconds` in all; yields each cell after its round. Raises ModelUnavailable.

    A round of a cell runs some of its forwards, at least one, and assumes the same time a padded token for the others.
    """
    share_s, until = seconds / (ROUNDS * max(1, len(cells))), clock() + seconds
    # In random order: the last batches have the remaining rows, which are not typical.
    order = random.Random(SEED)
    forwards = {cell: cycle(order.sample(cell.batches, len(cell.batches))) for cell in cells}
    for _ in range(ROUNDS):
        for cell in cells:
            if clock() >= until:
                return
            if not cell.no_room:
                _round(model, cell, forwards[cell], min(until, clock() + share_s), clock)
                yield cell


def _round(model: Model, cell: Cell, forwards: Iterator[Sequence[Prepared]], until: float, clock: Clock) -> None:
    tokens, began = 0, clock()
    while not tokens or clock() < until:
        batch = next(forwards)
        try:
            run(model, batch)
        except MemoryError:
            cell.no_room = True
            cell.rates.clear()
            return
        tokens += _computed(batch, cell.budget)
    seconds = max(clock() - began, 1e-9)
    all_tokens = sum(_computed(batch, cell.budget) for batch in cell.batches)
    cell.rates.append(cell.rows * tokens / (all_tokens * seconds))


def best(cells: Iterable[Cell], own: Budget) -> Cell | None:
    """The limits to use: `own` if within 5 % of the fastest, else the smallest that are; None if none was measured."""
    measured = [cell for cell in cells if cell.rates]
    fastest = max((cell.rate for cell in measured), default=0.0)
    good = [cell for cell in measured if GAIN * cell.rate >= fastest]
    return min(good, key=lambda cell: (not same(cell.budget, own), cell.budget.tokens, cell.budget.rows), default=None)


def same(one: Budget, other: Budget) -> bool:
    """Whether both have the same limits of rows and tokens."""
    return (one.rows, one.tokens) == (other.rows, other.tokens)


def _computed(batch: Sequence[Prepared], budget: Budget) -> int:
    return computed([row.tokens for row in batch], budget.packs)
