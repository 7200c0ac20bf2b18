"""A job that a worker holds: its rows, their outcomes, and the reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from millstream.broker.contract.errors import MillstreamError, ModelFailed
from millstream.broker.contract.job import Claim, Encoded, Job, Json, Reply
from millstream.broker.contract.stages import Stages
from millstream.broker.queue.lease import SUSPECT_ATTEMPTS
from millstream.worker.models.base import Prepared, Result
from millstream.worker.scheduling.batcher import Row

Outcome = Result

Rows = list[Row[Prepared]]

BY_SHARE = -1
"""Rank of rows that spend their class's share; they run before the first priority."""

SUSPECT = -2
"""Rank of the rows of suspects, before all others. They run alone, since a forward holds rows of one rank only."""


def priority_of(row: Row[Prepared]) -> int:
    """Position in PRIORITIES of the row's job, also if its rank is BY_SHARE or SUSPECT."""
    return int(row.owner[0]) - 1


@dataclass(slots=True, eq=False)
class ActiveJob:
    """A job that this worker holds. `prepared` has one entry a row; `outcomes` has None for a row without outcome yet.

    `request`: the job as its client sent it. `rows_left`: rows without an outcome. `started_at`: server ms of the first
    forward, 0 before it. `running_since`: monotonic seconds of the running forward's start. `digests`: cache key of
    each row's answer; empty if they are not cached. `records`: encoded output of its earlier runs, if it streams.
    `displaced`: number of times that its row left its slot here. `waits_since`: monotonic seconds of the last time.
    `prepared_at`, `ended_at`: server ms at which its rows could run, and had their outcomes; `batch` as in Stages.
    `batch_trace`: context of the span of its last batch, or "".
    `output_at`: monotonic seconds of the last piece of its text, None before the first one here.
    `first_output_at`: server ms of the first one here, 0 before it.
    `due_at`: server ms, `tokens`: of all its rows; both 0 until a window with targets holds it.
    """

    claim: Claim
    request: Job
    prepared: Sequence[Prepared | MillstreamError]
    name: str = field(init=False)
    outcomes: list[Outcome | None] = field(init=False)
    rows_left: int = field(init=False)
    started_at: int = 0
    running_since: float | None = None
    inference_ms: float = 0.0
    digests: Sequence[str] = ()
    records: bytes = b""
    displaced: int = 0
    waits_since: float = 0.0
    prepared_at: int = 0
    ended_at: int = 0
    batch: int = 0
    batch_trace: str = ""
    output_at: float | None = None
    first_output_at: int = 0
    due_at: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.name = self.claim.address.name
        self.outcomes = [row if isinstance(row, MillstreamError) else None for row in self.prepared]
        self.rows_left = self.outcomes.count(None)

    def in_model_s(self, now: float) -> float:
        """Seconds of all forwards over this job's rows, with the running one. `now`: monotonic seconds."""
        # In this order: if `pause` ran in between in another thread, no second would count twice.
        before_s, since = self.inference_ms / 1000, self.running_since
        return before_s + (now - since if since is not None else 0.0)

    def pause(self, now: float) -> None:
        """Notes that no forward over its rows runs any more. `now`: monotonic seconds."""
        in_model_s = self.in_model_s(now)
        self.running_since = None
        self.inference_ms = in_model_s * 1000

    def note_due(self, due_at: float) -> None:
        """Notes when it is due, server ms, and how many tokens its rows have."""
        self.due_at = due_at
        self.tokens = sum([row.tokens + row.output_tokens for row in self.prepared if isinstance(row, Prepared)])

    def rows(self) -> Rows:
        """The prepared rows, with rank and urgency."""
        rank = BY_SHARE if self.claim.by_share else int(self.name[0]) - 1
        if self.claim.attempts >= SUSPECT_ATTEMPTS:
            rank = SUSPECT
        # The sequence number orders jobs that arrived in one ms: else their rows would mix, and all would end late.
        ms, _, sequence = self.name[2:].partition("-")
        urgency = (rank, int(ms), int(sequence))
        return [
            Row(
                row.tokens + row.output_tokens,
                urgency,
                self.name,
                index,
                row,
                self.digests[index] if self.digests else "",
            )
            for index, row in enumerate(self.prepared)
            if isinstance(row, Prepared)
        ]

    def reply(self) -> Reply:
        """The answer. Every row must have its outcome."""
        if len(self.outcomes) == 1 and isinstance(vector := self.outcomes[0], np.ndarray):
            # The usual case, kept fast: one row, one vector.
            (row,) = cast(Sequence[Prepared], self.prepared)
            return Reply(
                vector[np.newaxis], tokens=row.tokens, truncated=(0,) if row.truncated else (), timings=self._timings()
            )
        errors = {at: out for at, out in enumerate(self.outcomes) if isinstance(out, MillstreamError)}
        good = [out for out in self.outcomes if not isinstance(out, MillstreamError)] if errors else self.outcomes
        shapes = {out.shape if isinstance(out, np.ndarray) else None for out in good}
        if len(shapes) > 1:
            self.outcomes = _alike(self.outcomes)
            return self.reply()
        prepared = [(at, row) for at, row in enumerate(self.prepared) if isinstance(row, Prepared)]
        dense = bool(shapes) and None not in shapes
        return Reply(
            vectors=np.stack(cast(list[Encoded], good)) if dense else None,
            values=None if dense else cast(list[Json], good),
            errors=errors,
            tokens=sum([row.tokens for _, row in prepared]),
            truncated=tuple([at for at, row in prepared if row.truncated]),
            timings=self._timings(),
        )

    def stages(self, worker: str, settled: int) -> Stages:
        """The times of this run. `settled`: server ms at which it is settled."""
        claim, prepared, started, ended = self.claim, self.prepared_at, self.started_at, self.ended_at
        return Stages(worker, claim.attempts, self.batch, self.request.at, claim.at, prepared, started, ended, settled)

    def _timings(self) -> dict[str, float]:
        """Milliseconds in the queue and in the model; empty if no row ran."""
        if not self.started_at:
            return {}
        return {"queue": float(max(0, self.started_at - self.request.at)), "inference": self.inference_ms}


def _shape(outcome: Outcome | None) -> tuple[int, ...] | None:
    return outcome.shape if isinstance(outcome, np.ndarray) else None


def _alike(outcomes: Sequence[Outcome | None]) -> list[Outcome | None]:
    """Replaces each result by ModelFailed if its shape is not that of more than half of the results."""
    counts = Counter(_shape(out) for out in outcomes if not isinstance(out, MillstreamError))
    most, number = counts.most_common(1)[0]
    usual = {most} if 2 * number > counts.total() else set()
    return [
        out
        if isinstance(out, MillstreamError) or _shape(out) in usual
        else ModelFailed("the model's result has another shape than those of the job's other rows")
        for out in outcomes
    ]
