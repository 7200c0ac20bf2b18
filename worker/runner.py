"""The main loop: take a micro-batch, run it, hand back its outcomes. Owns the device; runs in the main thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from millstream.broker.errors import MillstreamError, ModelFailed
from millstream.broker.job import Json, Reply, Vectors
from millstream.worker.batcher import padded
from millstream.worker.intake import expired
from millstream.worker.models.base import Model, Prepared
from millstream.worker.progress import Progress
from millstream.worker.settler import Finished
from millstream.worker.shared import Shared
from millstream.worker.window import Held, Outcome, Rows

EWMA_WEIGHT = 0.2

Jobs = dict[str, Held]
"""By name."""


class Runner:
    """Runs the window's rows until it is closed and empty."""

    def __init__(self, shared: Shared, model: Model, progress: Progress, finish: Callable[[Finished], None]) -> None:
        self._window = shared.window
        self._clock = shared.clock
        self._counters = shared.counters
        self._model = model
        self._progress = progress
        self._finish = finish

    def run(self) -> None:
        while batch := self._window.take():
            batch, jobs = self._in_time(batch)
            outcomes = self._forward(batch, jobs) if batch else []
            for held in self._window.complete(batch, outcomes):
                self._finish(Finished(held.claim.address, held.reply(), digests=held.digests))

    def _in_time(self, batch: Rows) -> tuple[Rows, Jobs]:
        """The rows that may still start, and their jobs; the callers of the others are told.

        The last check before the model. Rows whose job was dropped meanwhile go, too.
        """
        now = self._clock.now()
        found = [(row, held) for row in batch if (held := self._window.job_of(row))]
        missed = {held.name for _, held in found if _missed(held, now)}
        for held in self._window.end(missed):
            self._finish(Finished(held.claim.address, Reply(error=expired(held.job, _missed(held, now), now))))
        left = [each for each in found if each[0].owner not in missed] if missed else found
        return [row for row, _ in left], {held.name: held for _, held in left}

    def _forward(self, batch: Rows, jobs: Jobs) -> list[Outcome]:
        now, start = self._clock.now(), time.monotonic()
        for held in jobs.values():
            held.started_at = held.started_at or now
            held.running_since = start
        self._progress.start(jobs)
        once, places = _once(batch, jobs)
        outcomes = run_rows(self._model, [row.payload for row in once], self._progress.lap)
        self._progress.stop()
        self._account(once, outcomes, jobs, time.monotonic() - start)
        return [outcomes[place] for place in places]

    def _account(self, batch: Rows, outcomes: list[Outcome], jobs: Jobs, seconds: float) -> None:
        tokens, computed = sum(row.tokens for row in batch), padded(batch)
        count = self._counters
        count.forwards += 1
        count.rows += len(batch)
        count.tokens += tokens
        count.padded += computed
        count.errors += sum(1 for outcome in outcomes if isinstance(outcome, MillstreamError))
        count.busy_ms += round(seconds * 1000)
        rate = seconds / (computed + self._window.budget.overhead)
        before = self._window.seconds_per_token or rate
        self._window.seconds_per_token = before + EWMA_WEIGHT * (rate - before)
        for held in jobs.values():
            held.running_since = None
            held.timings["queue"] = float(max(0, held.started_at - held.job.at))
            held.timings["inference"] = held.timings.get("inference", 0.0) + seconds * 1000


def _once(batch: Rows, jobs: Jobs) -> tuple[Rows, Sequence[int]]:
    """The rows to run, and each row's place among them: those whose answer is kept under one name run once."""
    if not any(held.digests for held in jobs.values()):
        return batch, range(len(batch))
    once: Rows = []
    places: list[int] = []
    first: dict[str, int] = {}
    for row in batch:
        digests = jobs[row.owner].digests
        name = digests[row.index] if digests else ""
        place = first.setdefault(name, len(once)) if name else len(once)
        if place == len(once):
            once.append(row)
        places.append(place)
    return once, places


def _missed(held: Held, now: int) -> str:
    """The phase that is over at `now`; queue time ends with the job's first forward."""
    phase = held.job.missed(now)
    return "" if phase == "queue" and held.started_at else phase


def run_rows(model: Model, rows: Sequence[Prepared], lap: Callable[[], None] = lambda: None) -> list[Outcome]:
    """One outcome a row. Where a forward fails its rows are halved until the guilty one stands alone.

    `lap` is called between two forwards: each has the whole stall timeout.
    """
    try:
        results = model.forward(rows)
        if len(results) != len(rows):
            raise ModelFailed(f"the model gave {len(results)} results for {len(rows)} rows")
        return _checked(results)
    except Exception as error:  # noqa: BLE001 - a model may raise anything, and its neighbours must live
        if len(rows) == 1:
            return [_failure(error)]
        half = len(rows) // 2
        outcomes = []
        for part in (rows[:half], rows[half:]):
            lap()
            outcomes += run_rows(model, part, lap)
        return outcomes


def _failure(error: Exception) -> MillstreamError:
    if isinstance(error, MillstreamError):
        return error
    return ModelFailed(f"{type(error).__name__}: {error}"[:500])


def _checked(results: Vectors | list[Json]) -> list[Outcome]:
    # All at once where all are sound, as they nearly always are.
    if isinstance(results, np.ndarray) and np.isfinite(results).all():
        return list(results)
    return [_checked_row(result) for result in results]


def _checked_row(result: Outcome) -> Outcome:
    if isinstance(result, np.ndarray) and not np.isfinite(result).all():
        return ModelFailed("the model answered NaN or infinity")
    return result
