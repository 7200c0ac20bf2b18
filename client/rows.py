"""The rows of one call and what became of each: pure bookkeeping, in the caller's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import cast

import numpy as np

from millstream.broker.cache import Cached
from millstream.broker.errors import MillstreamError, ModelFailed, PartialFailure
from millstream.broker.job import Encoded, Json, Reply
from millstream.client.result import Embeddings, Timings, Values
from millstream.client.split import Part

RowOutcome = Encoded | Json | MillstreamError
"""A vector [dim], a JSON value, or the row's error."""


class Rows:
    """Outcomes by row, filled part by part; those of `given` are there from the start. `left` rows have none yet."""

    def __init__(self, count: int, given: Mapping[int, MillstreamError | Cached]) -> None:
        self._rows: list[RowOutcome] = [None] * count
        self.left = count - len(given)
        self._tokens = 0
        self._truncated: list[int] = []
        self._timings: Timings = {}
        self._failed = False
        for row, each in given.items():
            self._rows[row] = each.result if isinstance(each, Cached) else each
            if not isinstance(each, Cached):
                self._failed = True
            elif each.truncated:
                self._truncated.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, part: Part, outcome: Reply | MillstreamError) -> None:
        """Put what came for `part` into its rows; one error stands for all of them."""
        self.left -= part.size if part.twins else len(part.rows)
        if isinstance(outcome, MillstreamError):
            outcome = Reply(error=outcome)
        results: Sequence[RowOutcome] | Encoded
        results = outcome.vectors if outcome.vectors is not None else outcome.values or []
        if outcome.error or outcome.errors or len(results) != len(part.rows):
            good: Iterator[RowOutcome] = chain(results, iter(_missing, None))
            results = [outcome.error or outcome.errors.get(at) or next(good) for at in range(len(part.rows))]
            self._failed |= any(isinstance(each, MillstreamError) for each in results)
        for row, result in zip(part.rows, results, strict=True):
            self._rows[row] = result
        self._tokens += outcome.tokens
        if outcome.truncated:
            self._truncated += [part.rows[at] for at in outcome.truncated if at < len(part.rows)]
        self._timings = _slowest(self._timings, outcome.timings)
        if part.twins:
            self._place_twins(part, outcome)

    def _place_twins(self, part: Part, outcome: Reply) -> None:
        truncated = {part.rows[at] for at in outcome.truncated if at < len(part.rows)}
        for row, others in part.twins.items():
            for other in others:
                self._rows[other] = self._rows[row]
            self._truncated += others if row in truncated else ()

    def outcomes(self) -> list[RowOutcome]:
        return list(self._rows)

    def value(self, total_ms: float) -> Embeddings | list[Json]:
        """The call's result. Raises PartialFailure, or the rows' own error where all failed alike."""
        if self._failed:
            raise _failure(self._rows)
        truncated, timings = tuple(sorted(self._truncated)), {**self._timings, "total": total_ms}
        # Of a custom service some rows may be vectors, and some not.
        if not self._rows or not {np.ndarray}.issuperset(map(type, self._rows)):
            return Values.of(cast(list[Json], self._rows), self._tokens, truncated, timings)
        return Embeddings.of(_matrix(self._rows), self._tokens, truncated, timings)


def _matrix(rows: Sequence[RowOutcome]) -> Encoded:
    vectors = cast(Sequence[Encoded], rows)
    if len(vectors) == 1:
        return np.array(vectors[0], ndmin=2)
    if len({np.shape(vector) for vector in vectors}) > 1:
        raise ModelFailed(
            "its workers answered vectors of different lengths",
            hint="do all run the same model? map and outcomes() give each as it is",
        )
    return np.stack(vectors)


def _slowest(before: Timings, timings: Timings) -> Timings:
    """Of the slowest job; most calls have one."""
    if not before:
        return timings
    return {**before, **{name: max(ms, before.get(name, ms)) for name, ms in timings.items()}}


def _missing() -> MillstreamError:
    # A new one each time: an error that is raised keeps what its callers held alive.
    return ModelFailed("the worker's reply has no result for this row")


def _failure(rows: Sequence[RowOutcome]) -> MillstreamError:
    errors = {row: each for row, each in enumerate(rows) if isinstance(each, MillstreamError)}
    first_row, first = next(iter(errors.items()))
    if len(errors) == len(rows) and all(type(error) is type(first) for error in errors.values()):
        return first
    results: list[object] = [None if row in errors else result for row, result in enumerate(rows)]
    message = f"{len(errors)} of {len(rows)} rows failed; row {first_row}: {first}"
    return PartialFailure(message, errors=errors, results=results)
