"""The engine of models that answer all rows of a batch in one forward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

from millstream.broker.contract.codec import encode_value
from millstream.broker.contract.errors import MillstreamError, ModelFailed, described
from millstream.broker.contract.job import Json, Vectors
from millstream.telemetry.logs import stack_of
from millstream.worker.engines.base import Step
from millstream.worker.forward_cost import ForwardCost
from millstream.worker.models.base import NOT_FINITE, Model, Prepared, packs
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, computed
from millstream.worker.scheduling.memory import Fit, is_exhaustion
from millstream.worker.shutdown import Ended

log = logging.getLogger(__name__)


class OneShot:
    """Runs each admitted batch in one step; a failed forward is repeated in parts within that step.

    `lap` is as in run_rows. `cost` learns how many tokens fit into memory. Rows with one cache key run once.
    """

    def __init__(
        self,
        model: Model,
        lap: Callable[[], None] = lambda: None,
        cost: ForwardCost | None = None,
    ) -> None:
        self._model = model
        self._lap = lap
        self._cost = cost
        self._rows: Rows = []
        # An attribute: it is read twice for each batch.
        self.busy = False

    def room(self) -> Budget | None:
        return None

    def admit(self, rows: Rows) -> None:
        self._rows, self.busy = rows, bool(rows)

    def abort(self, rows: Rows) -> None:
        dropped = set(map(id, rows))
        self.admit([row for row in self._rows if id(row) not in dropped])

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        """Raises NotImplementedError: no row has output before it is complete."""
        raise NotImplementedError

    def step(self) -> Step:
        rows, self._rows, self.busy = self._rows, [], False
        unique, places = _unique(rows) if any(row.key for row in rows) else (rows, None)
        outcomes = run_rows(self._model, [row.payload for row in unique], self._lap, self._too_large)
        if places:
            outcomes = [outcomes[place] for place in places]
        lengths = [row.tokens for row in unique]
        size = computed(lengths, packs(self._model))
        return Step(rows, outcomes, ran=len(unique), tokens=sum(lengths), computed=size)

    def _too_large(self, most: int) -> None:
        """Limits later batches to `most` tokens, which fitted into memory."""
        if self._cost and self._cost.cap(most):
            log.warning("out of memory: batches hold at most %d tokens from now on, padding included", most)


def _unique(rows: Rows) -> tuple[Rows, Sequence[int]]:
    """The distinct rows to run, and each row's place among them. A row without a key is distinct."""
    unique: Rows = []
    places: list[int] = []
    first: dict[str, int] = {}
    for row in rows:
        place = first.setdefault(row.key, len(unique)) if row.key else len(unique)
        if place == len(unique):
            unique.append(row)
        places.append(place)
    return unique, places


def run_rows(
    model: Model,
    rows: Sequence[Prepared],
    lap: Callable[[], None] = lambda: None,
    too_large: Callable[[int], object] = lambda most: None,
) -> list[Outcome]:
    """Returns one outcome a row. If a forward fails, its rows are halved until each failing row runs alone.

    `lap` is called between two forwards, so that each has the whole stall timeout. If a forward ran out of memory,
    `too_large` is called with the number of tokens, padding included, that fits.
    """
    outcomes = _try(model, rows)
    if not isinstance(outcomes, _Fault):
        return outcomes
    fit = Fit(packs(model))
    outcomes = _run_in_parts(model, rows, lap, fit, outcomes)
    if fit.most is not None:
        too_large(fit.most)
    return outcomes


class _Fault(NamedTuple):
    """A forward that failed. `failure` is None if it was not tried, since a smaller one ran out of memory."""

    exhausted: bool
    failure: MillstreamError | None


def _try(model: Model, rows: Sequence[Prepared]) -> list[Outcome] | _Fault:
    try:
        return _checked(model.forward(rows), len(rows))
    except Ended:
        raise
    except BaseException as error:  # noqa: BLE001 - a user's sys.exit or a panic must end no other row
        return _Fault(is_exhaustion(error), _failure(error))


def _run(model: Model, rows: Sequence[Prepared], lap: Callable[[], None], fit: Fit) -> list[Outcome]:
    outcomes = _Fault(True, None) if fit.rules_out(rows) else _try(model, rows)
    if isinstance(outcomes, _Fault):
        return _run_in_parts(model, rows, lap, fit, outcomes)
    fit.add_fitting(rows)
    return outcomes


def _run_in_parts(
    model: Model, rows: Sequence[Prepared], lap: Callable[[], None], fit: Fit, fault: _Fault
) -> list[Outcome]:
    """Returns one outcome a row, after their forward failed with `fault`. No error is handled meanwhile: a handled
    error keeps the memory of its forward allocated."""
    if fault.failure and len(rows) == 1:
        fit.alone += fault.exhausted
        return [fault.failure]
    alone, half, outcomes = fit.alone, len(rows) // 2, []
    for part in (rows[:half], rows[half:]):
        lap()
        outcomes += _run(model, part, lap, fit)
    if fault.exhausted and fit.alone == alone:
        fit.add_too_large(rows)
    return outcomes


def _failure(error: BaseException) -> MillstreamError:
    # Without its message, which may quote an input.
    log.debug("a forward failed: %s", stack_of(error))
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
