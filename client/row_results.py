"""Row results: the outcome of each row of a call, in the caller's order. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np

from millstream.broker.contract.errors import MillstreamError, MixedModels, ModelFailed, PartialFailure
from millstream.broker.contract.job import Encoded, Json, Reply
from millstream.broker.contract.operations import ResultKind
from millstream.broker.queue.cache import Cached
from millstream.client.generate import Generated
from millstream.client.result import Embeddings, Timings, Values, read_generation
from millstream.client.split import Part

RowOutcome = Encoded | Json | Generated | MillstreamError
"""Outcome of a row: a vector [dim], a JSON value, a text with its usage, or the row's error."""


class RowResults:
    """Outcomes by row, filled part by part. `missing` is the number of rows that have none yet.

    `given` are the outcomes that are known from the start. `kind` are the results that the call's operation has: other
    results become their row's error.
    """

    def __init__(self, count: int, given: Mapping[int, MillstreamError | Cached], kind: ResultKind = "any") -> None:
        self._rows: list[RowOutcome] = [None] * count
        self.missing = count - len(given)
        self._tokens = 0
        self._truncated: list[int] = []
        self._timings: Timings = {}
        self._failed = False
        self._kind = kind
        # Results of these kinds are read one by one.
        self._reads = kind in ("scores", "generations")
        self._fingerprint: str | None = None
        self._others: set[str] = set()
        for row, each in given.items():
            self._rows[row] = each.result if isinstance(each, Cached) else each
            if not isinstance(each, Cached):
                self._failed = True
                continue
            self._note(each.fingerprint)
            if each.truncated:
                self._truncated.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, part: Part, outcome: Reply | MillstreamError) -> None:
        """Stores the outcome of `part` in its rows; an error is stored in all of them."""
        self.missing -= part.size if part.twins else len(part.rows)
        if isinstance(outcome, MillstreamError):
            outcome = Reply(error=outcome)
        results: Sequence[RowOutcome] | Encoded
        vectors = outcome.vectors
        # A fast path, since most replies have one vector or value for each row and no error.
        if (
            vectors is not None
            and len(vectors) == len(part.rows)
            and not (outcome.errors or outcome.error or self._reads)
            and _is_finite(vectors)
        ):
            results = vectors
        elif (
            outcome.values
            and len(outcome.values) == len(part.rows)
            and not (outcome.errors or outcome.error or self._reads)
        ):
            results = outcome.values
        else:
            results = _checked(outcome, len(part.rows))
            if self._reads:
                read = _score if self._kind == "scores" else partial(_generated, reply=outcome)
                results = [read(each) for each in results]
            self._failed = self._failed or any(isinstance(each, MillstreamError) for each in results)
        for row, result in zip(part.rows, results, strict=True):
            self._rows[row] = result
        if outcome.fingerprint != self._fingerprint and outcome.error is None:
            self._note(outcome.fingerprint)
        self._tokens += outcome.tokens
        if outcome.truncated:
            self._truncated += [part.rows[at] for at in outcome.truncated if at < len(part.rows)]
        self._timings = _slowest(self._timings, outcome.timings) if self._timings else outcome.timings
        if part.twins:
            self._place_twins(part, outcome)

    @property
    def tokens(self) -> int:
        """Tokens that the model ran for all rows so far."""
        return self._tokens

    @property
    def failure(self) -> MillstreamError | None:
        """The error that `value` raises because rows failed; None if no row did."""
        return _failure(self._rows) if self._failed else None

    def _note(self, fingerprint: str) -> None:
        """Notes a fingerprint of the weights that made rows. Nearly all calls have one."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            self._others.add(fingerprint)

    def _check_fingerprints(self) -> None:
        # A worker of an older version reports an empty fingerprint.
        named = {self._fingerprint or "", *self._others} - {""}
        if len(named) > 1:
            raise MixedModels(
                f"its rows were answered by different models: {', '.join(sorted(named))}"[:500],
                hint="call again once all workers run the same weights; map and outcomes() give each row as it is",
            )

    def _place_twins(self, part: Part, outcome: Reply) -> None:
        truncated = {part.rows[at] for at in outcome.truncated if at < len(part.rows)}
        for row, others in part.twins.items():
            for other in others:
                self._rows[other] = self._rows[row]
            self._truncated += others if row in truncated else ()

    def outcomes(self) -> list[RowOutcome]:
        """Returns each row's result or error; None for a row that has none yet."""
        return list(self._rows)

    def value(self, total_ms: float) -> Embeddings | list[Json]:
        """Returns the call's result. `total_ms` is the time of the whole call.

        Raises PartialFailure if some rows failed, the first row's error if all failed with the same type, MixedModels
        if rows were made by different weights, and ModelFailed if their vectors do not fit together.
        """
        # Each text names the weights that made it; other results must not be mixed.
        if self._others and self._kind != "generations":
            self._check_fingerprints()
        if self._failed:
            raise _failure(self._rows)
        fingerprint = "" if self._others else self._fingerprint or ""
        truncated, timings = tuple(sorted(self._truncated)), {**self._timings, "total": total_ms}
        # A custom service may answer some rows with vectors and others with JSON values.
        kinds = set(map(type, self._rows))
        if kinds != {np.ndarray}:
            if self._kind == "vectors" and np.ndarray in kinds:
                raise ModelFailed(
                    "its workers answered dense vectors and sparse ones", hint="do all run the same model?"
                )
            return Values.of(cast(list[Json], self._rows), self._tokens, truncated, timings, fingerprint)
        return Embeddings.of(_matrix(self._rows), self._tokens, truncated, timings, fingerprint)


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
    """Returns the larger of two timings for each name."""
    return {**before, **{name: max(ms, before.get(name, ms)) for name, ms in timings.items()}}


def _checked(reply: Reply, rows: int) -> Sequence[RowOutcome]:
    """Returns one outcome for each of a job's `rows`.

    If a reply has more or fewer outcomes than rows, each row gets an error: the results cannot be matched to rows.
    """
    vectors, values, errors, error, *_ = reply
    if error is not None:
        return [error] * rows
    results: Sequence[RowOutcome] = list(vectors) if vectors is not None else values or ()
    if len(results) + len(errors) != rows or (errors and max(errors) >= rows):
        # A new error for each row: a raised error keeps its caller's frames alive.
        return [_unusable(len(results), len(errors), rows) for _ in range(rows)]
    if vectors is not None and not _is_finite(vectors):
        results = [vector if np.isfinite(vector).all() else _not_finite() for vector in vectors]
    good = iter(results)
    return [errors.get(row) or next(good) for row in range(rows)] if errors else results


def _is_finite(vectors: Encoded) -> bool:
    """Returns whether no number is NaN or infinite."""
    # Takes half the time of all(), which handles arrays of any shape.
    return vectors.dtype.kind == "u" or b"\0" not in np.isfinite(vectors).tobytes()


def _score(result: RowOutcome) -> RowOutcome:
    """Returns a row's score or error. Other results become an error."""
    if isinstance(result, float | int | MillstreamError) and not isinstance(result, bool):
        return result
    return ModelFailed(f"the worker's reply has a score of type {type(result).__name__}")


def _generated(result: RowOutcome, reply: Reply) -> RowOutcome:
    """Returns a row's text or error. Other results become an error."""
    if isinstance(result, MillstreamError):
        return result
    try:
        return Generated.of(read_generation(result), reply.version or reply.fingerprint, reply.timings)
    except ModelFailed as error:
        return error


def _not_finite() -> MillstreamError:
    return ModelFailed("the worker's reply has NaN or infinity in this row's vector")


def _unusable(results: int, errors: int, rows: int) -> MillstreamError:
    return ModelFailed(
        f"the worker's reply has {results} results and {errors} errors for {rows} rows",
        hint="client and worker of different versions?",
    )


def _failure(rows: Sequence[RowOutcome]) -> MillstreamError:
    errors = {row: each for row, each in enumerate(rows) if isinstance(each, MillstreamError)}
    first_row, first = next(iter(errors.items()))
    if len(errors) == len(rows) and all(type(error) is type(first) for error in errors.values()):
        return first
    results: list[object] = [None if row in errors else result for row, result in enumerate(rows)]
    message = f"{len(errors)} of {len(rows)} rows failed; row {first_row}: {first}"
    return PartialFailure(message, errors=errors, results=results)
