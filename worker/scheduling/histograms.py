"""Histograms of a lane's forwards, outputs and answers since its process started; they go out with the heartbeat.

Each is observed by one thread: forwards and outputs by the runner, answers by the settler. The heartbeat reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from millstream.broker.contract.job import PRIORITIES
from millstream.broker.contract.metrics import HISTOGRAMS, Histogram, fields_of
from millstream.worker.scheduling.active_job import ActiveJob

MOST_WAITING = 500
"""Rows that wait at most until they are put into buckets: so many at once cost a fifth of one after another."""


class _Observed:
    """Histograms that are observed together: a row has one value for each of `columns`, NaN if it has none.

    `columns`: names of the histograms that get its values. For one thread that adds rows, and others that read.
    """

    __slots__ = ("_names", "_places", "_width", "state")

    def __init__(self, *columns: Sequence[str]) -> None:
        self._names = [name for names in columns for name in names]
        self._places = [place for place, names in enumerate(columns) for _ in names]
        self._width = len(columns)
        # The histograms, and values that are not in them yet. Replaced as a whole, for threads that read.
        self.state: tuple[Sequence[Histogram], list[float]] = (
            [Histogram.empty(HISTOGRAMS[name]) for name in self._names],
            [],
        )

    def add(self, row: Sequence[float]) -> None:
        waiting = self.state[1]
        waiting += row
        if len(waiting) >= MOST_WAITING * len(row):
            self.fold()

    def fold(self) -> None:
        """Puts all values into buckets."""
        self.state = (self._read(), [])

    def read(self) -> Iterable[tuple[str, Histogram]]:
        """Returns each histogram with its name."""
        return zip(self._names, self._read(), strict=True)

    def _read(self) -> Sequence[Histogram]:
        histograms, waiting = self.state
        # A copy: meanwhile the other thread may add.
        if not (values := waiting.copy()):
            return histograms
        # No value is negative, but times are differences of a clock that may step back.
        columns = np.maximum(np.fromiter(values, np.float64, len(values)), 0.0).reshape(-1, self._width).T
        found = [column[~np.isnan(column)] for column in columns]
        return [each.plus(found[place]) for each, place in zip(histograms, self._places, strict=True)]


class Histograms:
    """All histograms of the contract. Times are in ms."""

    def __init__(self) -> None:
        # By the number of the stream, with which an entry's name begins: each answer needs it.
        self._answers = {
            str(number): _Observed([f"wait:{priority}"], [f"total:{priority}", "latency"], ["inference"])
            for number, priority in enumerate(PRIORITIES, start=1)
        }
        self._waiting = {stream: observed.state[1] for stream, observed in self._answers.items()}
        self._forwards = _Observed(["batch_rows"], ["batch_tokens"], ["padding"])
        self._first, self._between = _Observed(["first_token"]), _Observed(["between_tokens"])

    def __getitem__(self, name: str) -> Histogram:
        return self._read()[name]

    def add_forward(self, rows: int, tokens: int, computed: int) -> None:
        """Adds a forward over `rows`. `computed`: tokens with padding, 0 if unknown."""
        padding = computed / tokens if tokens and computed else math.nan
        self._forwards.add((rows, computed or tokens, padding))

    def add_output(self, job: ActiveJob, now: int, now_s: float) -> None:
        """Adds a piece of the text of `job` at `now`, server ms, and `now_s`, monotonic seconds."""
        if job.output_at is not None:
            self._between.add(((now_s - job.output_at) * 1000,))
        else:
            job.first_output_at = now
            if not job.records:
                self._first.add((now - job.request.at,))
        job.output_at = now_s

    def answers(self) -> Mapping[str, list[float]]:
        """Returns lists by the number of the stream, for the settler, which asks for them each time.

        It adds three times of each answered job that ran: to its first forward, to its end, and in the model.
        """
        # Not a method for each job: it would take twice the time.
        if sum(map(len, self._waiting.values())) >= 3 * MOST_WAITING:
            for observed in self._answers.values():
                observed.fold()
            self._waiting = {stream: observed.state[1] for stream, observed in self._answers.items()}
        return self._waiting

    def counts(self) -> dict[str, int]:
        """Returns all fields so far that are not zero."""
        return {
            field: count
            for name, histogram in self._read().items()
            for field, count in fields_of(name, histogram).items()
        }

    def _read(self) -> Mapping[str, Histogram]:
        found: dict[str, Histogram] = {}
        for observed in (*self._answers.values(), self._forwards, self._first, self._between):
            for name, histogram in observed.read():
                found[name] = found[name].merged(histogram) if name in found else histogram
        return found
