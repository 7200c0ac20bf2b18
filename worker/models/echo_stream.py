"""A model that says its input word by word. No torch: for tests of streaming and for measuring it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from millstream.broker.config.load import ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, MillstreamError, ModelFailed, described
from millstream.broker.contract.job import Json
from millstream.broker.contract.partial import Record
from millstream.worker.engines.base import Step
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.models.echo import Habits
from millstream.worker.scheduling.active_job import Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Row

BEGAN = b"began"
"""State of the first record that a run made: so a reader of the records sees at which words workers began."""

_WORD = re.compile(r"\s*\S+\s*|\s+")


def load(spec: ServiceSpec, device: str | None, threads: int, folder: str) -> EchoStreamModel:
    """The model of `spec`, with `batch_size` rows at once."""
    return EchoStreamModel(spec.model.model_name, spec.runtime.batch_size)


@dataclass(slots=True)
class Speech:
    """One row: its words, the number of words said, and the words at which runs began."""

    words: Sequence[str]
    limit: int
    said: int = 0
    began: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.said >= min(self.limit, len(self.words))


class EchoStreamModel:
    """Says each row's words, one a step for every row that it holds; `slots` rows at once.

    Its `model_name` can give it the habits of EchoModel: `sleep:0.01` is the time of a step in seconds; `crash:WORD`
    ends the process when it is about to say WORD. The option `max_tokens` limits the words.
    """

    op = "stream"
    sample_options = NO_OPTIONS

    def __init__(self, model_name: str = "", slots: int = 32) -> None:
        self._habits = Habits.of(model_name)
        self._slots = slots
        self.fingerprint = f"echo-stream:{model_name}"

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        limit = options.get("max_tokens")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            return [InvalidRequest(f"max_tokens={limit!r} is not a number of words above 0")] * len(inputs)
        return [self._row(value, limit or 10**9) for value in inputs]

    def _row(self, value: Json, limit: int) -> Prepared | MillstreamError:
        if not isinstance(value, str):
            return InvalidRequest(f"not a string but {type(value).__name__}")
        words = _WORD.findall(value)
        return Prepared(max(1, len(words)), Speech(words, limit))

    def begin(self, row: Prepared, job_id: str, records: Sequence[Record]) -> None:
        """Goes on behind `records`, which earlier runs of this row made."""
        speech = cast(Speech, row.features)
        speech.said = len(records)
        speech.began = [at for at, record in enumerate(records) if record.state == BEGAN]

    def forward(self, rows: Sequence[Prepared]) -> list[Json]:
        """Says the rows as a whole."""
        engine = self.start_engine()
        engine.admit([Row(row.tokens, (), str(at), 0, row) for at, row in enumerate(rows)])
        said: dict[str, Outcome] = {}
        while engine.busy:
            step = engine.step()
            said |= {row.owner: outcome for row, outcome in zip(step.rows, step.outcomes, strict=True)}
        return [cast(Json, said[str(at)]) for at in range(len(rows))]

    def samples(self, tokens: int) -> Sequence[Json]:
        return ()

    def start_engine(self) -> EchoStreamEngine:
        return EchoStreamEngine(self._habits, self._slots)


class EchoStreamEngine:
    """Rows that are being said."""

    def __init__(self, habits: Habits, slots: int) -> None:
        self._habits = habits
        self._slots = slots
        self._rows: Rows = []

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    def room(self) -> Budget | None:
        return Budget(self._slots - len(self._rows), 10**9)

    def admit(self, rows: Rows) -> None:
        self._rows += rows
        for row in rows:
            speech = _speech(row)
            speech.began.append(speech.said)

    def abort(self, rows: Rows) -> None:
        dropped = set(map(id, rows))
        self._rows = [row for row in self._rows if id(row) not in dropped]

    def conclude(self, rows: Rows, reason: str) -> Sequence[Outcome]:
        self.abort(rows)
        return [_outcome(_speech(row), reason) for row in rows]

    def step(self) -> Step:
        self._habits.sleep(len(self._rows))
        records: list[tuple[Row[Prepared], Record]] = []
        done: Rows = []
        outcomes: list[Outcome] = []
        for row in self._rows:
            speech = _speech(row)
            try:
                if record := self._say(speech):
                    records.append((row, record))
            except Exception as error:  # noqa: BLE001 - a row's fault is its outcome
                done.append(row)
                outcomes.append(ModelFailed(described(error)))
                continue
            if speech.is_over:
                done.append(row)
                outcomes.append(_outcome(speech))
        self.abort(done)
        return Step(done, outcomes, records, ran=len(done), tokens=len(records))

    def _say(self, speech: Speech) -> Record | None:
        if speech.is_over:
            return None
        word = speech.words[speech.said]
        self._habits.misbehave([word])
        state = BEGAN if speech.said == speech.began[-1] else b""
        speech.said += 1
        return Record(word, state)


def _speech(row: Row[Prepared]) -> Speech:
    return cast(Speech, row.payload.features)


def _outcome(speech: Speech, reason: str = "") -> Json:
    reason = reason or ("stop" if speech.said == len(speech.words) else "length")
    return {"text": "".join(speech.words[: speech.said]), "finish_reason": reason, "began": list(speech.began)}
