"""The main loop: takes a micro-batch, runs it, returns its outcomes. Owns the device; runs in the main thread."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from millstream.broker.contract.codec import encode_value
from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.job import Json, Reply, Vectors
from millstream.worker.context import Context
from millstream.worker.intake.intake import expired
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import NOT_FINITE, Model, Prepared, packs
from millstream.worker.scheduling.active_job import ActiveJob, Outcome, Rows
from millstream.worker.scheduling.memory import Fit, is_exhaustion
from millstream.worker.shutdown import Ended
from millstream.worker.supervision.progress import Stage

log = logging.getLogger(__name__)

Jobs = dict[str, ActiveJob]
"""Jobs by name."""


class Runner:
    """Runs the window's rows until it is closed and empty."""

    def __init__(self, context: Context, model: Model, finish: Callable[[Finished], None]) -> None:
        self._window = context.window
        self._clock = context.clock
        self._counters = context.counters
        self._model = model
        self._track = context.progress.runner
        self._threads = context.threads
        self._finish = finish

    def run(self) -> None:
        while batch := self._window.take():
            # Before the check of deadlines: this may take a while, and a job that expires meanwhile must not start.
            self._threads.adapt(idle=not self._window.waiting)
            batch, jobs = self._in_time(batch)
            outcomes = self._forward(batch, jobs) if batch else []
            for job in self._window.complete(batch, outcomes):
                self._finish(Finished(job.claim.address, job.reply(), digests=job.digests))
            # After the replies are made: a reply of large results may be what ends the process.
            self._track.stop()

    def _in_time(self, batch: Rows) -> tuple[Rows, Jobs]:
        """Returns the rows that may still start, and their jobs. Jobs whose time is over are finished with an error.

        It is the last check before the model. Rows whose job was ended meanwhile are dropped.
        """
        now = self._clock.now()
        found = self._window.jobs_of(batch)
        jobs = {job.name: job for job in found if job}
        missed = [name for name, job in jobs.items() if _missed(job, now)]
        if not missed and None not in found:
            return batch, jobs
        for job in self._window.end(missed):
            self._finish(Finished(job.claim.address, Reply(error=expired(job.request, _missed(job, now), now))))
        in_time = {name: job for name, job in jobs.items() if name not in missed}
        return [row for row, job in zip(batch, found, strict=True) if job and job.name in in_time], in_time

    def _forward(self, batch: Rows, jobs: Jobs) -> list[Outcome]:
        now, start = self._clock.now(), time.monotonic()
        for job in jobs.values():
            job.started_at = job.started_at or now
            job.running_since = start
        self._track.start(jobs, Stage.RUN)
        unique, places = _unique(batch, jobs)
        outcomes = run_rows(self._model, [row.payload for row in unique], self._track.lap, self._too_large)
        self._account(unique, outcomes, jobs, time.monotonic() - start)
        return [outcomes[place] for place in places]

    def _too_large(self, most: int) -> None:
        """Limits later batches to `most` tokens, which fitted into memory."""
        if self._window.cost.cap(most):
            log.warning("out of memory: batches hold at most %d tokens from now on, padding included", most)

    def _account(self, batch: Rows, outcomes: list[Outcome], jobs: Jobs, seconds: float) -> None:
        tokens, computed = sum(row.tokens for row in batch), self._window.budget.computed(batch)
        count = self._counters
        count.forwards += 1
        count.cuts[self._window.cut] += 1
        count.rows += len(batch)
        count.tokens += tokens
        count.padded += computed
        count.errors += sum(1 for outcome in outcomes if isinstance(outcome, MillstreamError))
        count.busy_ms += round(seconds * 1000)
        self._window.cost.observe(computed, seconds)
        for job in jobs.values():
            job.running_since = None
            job.inference_ms += seconds * 1000


def _unique(batch: Rows, jobs: Jobs) -> tuple[Rows, Sequence[int]]:
    """The distinct rows to run, and each row's place among them. Rows with the same cache key run once."""
    if not any(job.digests for job in jobs.values()):
        return batch, range(len(batch))
    unique: Rows = []
    places: list[int] = []
    first: dict[str, int] = {}
    for row in batch:
        digests = jobs[row.owner].digests
        name = digests[row.index] if digests else ""
        place = first.setdefault(name, len(unique)) if name else len(unique)
        if place == len(unique):
            unique.append(row)
        places.append(place)
    return unique, places


def _missed(job: ActiveJob, now: int) -> str:
    """The phase whose time is over at `now`, or "". Queue time ends with the job's first forward."""
    phase = job.request.missed(now)
    return "" if phase == "queue" and job.started_at else phase


def run_rows(
    model: Model,
    rows: Sequence[Prepared],
    lap: Callable[[], None] = lambda: None,
    too_large: Callable[[int], None] = lambda most: None,
) -> list[Outcome]:
    """Returns one outcome a row. If a forward fails, its rows are halved until each failing row runs alone.

    `lap` is called between two forwards, so that each has the whole stall timeout. If a forward ran out of memory,
    `too_large` is called with the number of tokens, padding included, that fits.
    """
    fit = Fit(packs(model))
    outcomes = _run(model, rows, lap, fit)
    if fit.most is not None:
        too_large(fit.most)
    return outcomes


def _run(model: Model, rows: Sequence[Prepared], lap: Callable[[], None], fit: Fit) -> list[Outcome]:
    exhausted, failure = True, None
    if not fit.rules_out(rows):
        try:
            outcomes = _checked(model.forward(rows), len(rows))
            fit.add_fitting(rows)
            return outcomes
        except Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - a user's sys.exit or a panic must end no other row
            exhausted, failure = is_exhaustion(error), _failure(error)
    # Outside of the except block: a handled error keeps the memory of its forward allocated.
    if failure and len(rows) == 1:
        fit.alone += exhausted
        return [failure]
    alone, half, outcomes = fit.alone, len(rows) // 2, []
    for part in (rows[:half], rows[half:]):
        lap()
        outcomes += _run(model, part, lap, fit)
    if exhausted and fit.alone == alone:
        fit.add_too_large(rows)
    return outcomes


def _failure(error: BaseException) -> MillstreamError:
    log.debug("a forward failed", exc_info=error)
    if isinstance(error, MillstreamError):
        return error.with_traceback(None)
    return ModelFailed(described(error))


def _checked(results: Vectors | list[Json] | list[Outcome], count: int) -> list[Outcome]:
    if len(results) != count:
        raise ModelFailed(f"the model gave {len(results)} results for {count} rows")
    # The usual case, kept fast: all results are valid.
    if isinstance(results, np.ndarray) and np.isfinite(results).all():
        return list(results)
    if {str}.issuperset(map(type, results)) and _is_unicode(cast(list[str], results)):
        return list(results)
    return [_checked_row(result) for result in results]


def _is_unicode(texts: Sequence[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_row(result: Outcome) -> Outcome:
    if isinstance(result, MillstreamError):
        return result
    if isinstance(result, np.ndarray):
        return result if np.isfinite(result).all() else ModelFailed(NOT_FINITE)
    if isinstance(result, float):
        return result if math.isfinite(result) else ModelFailed(NOT_FINITE)
    try:
        encode_value(result)
    except Ended:
        raise
    except BaseException as error:  # noqa: BLE001 - a result may have code of its own
        return ModelFailed(f"the model's result cannot be encoded as JSON: {described(error)}")
    return result
