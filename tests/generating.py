"""Runs the engines of language models in tests: random jobs, their rows, and a loop that admits, steps and cancels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import MillstreamError
from millstream.broker.contract.partial import Record
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.batcher import Row

LENGTHS = (1, 3, 20, 64, 65, 100, 128, 150)
"""Tokens of prompts: around the size of a block."""

VOCABULARY = 300
"""Ids below this are in the vocabulary of each tiny model; those of special tokens are below FIRST."""

FIRST = 8


class Job(NamedTuple):
    """A prompt, as token ids, and the most tokens to generate."""

    prompt: list[int]
    most: int

    @classmethod
    def random(cls, rng: random.Random, *, tokens: int | None = None, most: int | None = None) -> Job:
        length = tokens or rng.choice(LENGTHS)
        return cls([rng.randrange(FIRST, VOCABULARY) for _ in range(length)], most or rng.randrange(1, 60))


def load(
    folder: Path,
    *,
    dtype: str = "auto",
    kernels: str = "auto",
    slots: int = 12,
    tokens: int = 8_192,
    context: int | None = None,
) -> Any:
    """The language model in `folder`, loaded as a worker loads it; `context` shortens the texts that it reads."""
    # Torch takes seconds to import; most tests need none.
    from millstream.worker.generation import model

    settings: dict[str, Any] = {"dtype": dtype, "kernels": kernels, "max_length": context}
    spec = ServiceSpec(
        name="chat",
        model=ModelSpec(type="llm", model_name=str(folder), **settings),
        model_ref="m",
        runtime=Runtime(batch_size=slots, max_batch_tokens=tokens),
    )
    return model.load(spec, "cpu", 1, "")


def rows_of(
    model: Any, jobs: Sequence[Job], options: Mapping[str, Any], records: Sequence[Record] = ()
) -> list[Row[Prepared]]:
    """Prepared rows, as a worker makes them. Rows of equal calls have equal names."""
    rows = []
    for at, job in enumerate(jobs):
        (prepared,) = model.prepare([{"token_ids": job.prompt}], {"max_tokens": job.most, **options})
        if isinstance(prepared, MillstreamError):
            raise prepared
        name = f"{at}{'-seed' if 'seed' in options else ''}"
        model.begin(prepared, name, records)
        rows.append(Row(prepared.tokens, (1, at), name, 0, prepared))
    return rows


class Run:
    """An engine of `model`, and what it did: `displaced` rows, and the texts that ran in each step.

    Its steps run on each number of `threads` in turn.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int = 12,
        cache_tokens: int = 8_192,
        part_tokens: int | None = None,
        threads: Sequence[int] = (1,),
    ) -> None:
        from millstream.worker.generation.engine import SlotsEngine
        from millstream.worker.generation.forward import Forward
        from millstream.worker.generation.sampling import choose

        self.engine = SlotsEngine(Forward(model._model, model._decoder), choose, slots, cache_tokens, part_tokens)
        self._threads = cycle(threads)
        self.displaced = 0
        self.running: list[int] = []

    @property
    def mean_running(self) -> float:
        return sum(self.running) / len(self.running)

    def until_done(
        self, rows: Sequence[Row[Prepared]], rng: random.Random, cancelled: Sequence[Row[Prepared]] = ()
    ) -> dict[str, Any]:
        """Admits `rows` in random order, runs them, and aborts those of `cancelled` at random times.

        Returns the outcomes by name: the ids as "tokens", the usage without cached tokens, or the error.
        """
        from millstream.worker.models.kernels.cpu import use_threads

        engine, waiting = self.engine, rng.sample(rows, len(rows))
        to_cancel = list(cancelled)
        outcomes: dict[str, Any] = {}
        self.cached = 0
        while waiting or engine.busy:
            while waiting and (room := engine.room()) and room.rows > 0 and rng.random() < 0.8:
                engine.admit([waiting.pop(0)])
            if to_cancel and rng.random() < 0.1:
                gone = to_cancel.pop()
                engine.abort([gone])
                waiting = [row for row in waiting if row is not gone]
            if not engine.busy:
                continue
            use_threads(next(self._threads))
            step = engine.step()
            self.running.append(len(engine._holding.running))
            self.displaced += len(step.displaced)
            waiting = [*step.displaced, *waiting]
            for row, outcome in zip(step.rows, step.outcomes, strict=True):
                outcomes[row.owner] = self._read(row, outcome)
        use_threads(1)
        return outcomes

    def _read(self, row: Row[Prepared], outcome: Any) -> Any:
        if isinstance(outcome, MillstreamError):
            return outcome
        text: Any = row.payload.features
        *usage, cached = outcome["usage"]
        self.cached += cached
        return {**outcome, "usage": usage, "tokens": text.tokens[text.prompt_length :]}


def tokens_of(outcome: Any) -> list[int]:
    """The generated ids."""
    return list(outcome["tokens"])
