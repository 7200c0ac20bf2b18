"""Texts of a language model get the slots and blocks of the engine by their priority, through the runner."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contracts.held import NOW, claim_of
from generating import Job, load

from millstream.broker.contract.job import Priority
from millstream.worker.clock import ServerClock
from millstream.worker.context import Context
from millstream.worker.engines.base import Step
from millstream.worker.engines.runner import Runner
from millstream.worker.generation.record import Token
from millstream.worker.intake.settler import Finished
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window

BLOCK = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import language_models

    return language_models.save_language_model(tmp_path_factory.mktemp("language-model") / "grouped", "grouped")


class Bench:
    """A runner over an engine of `blocks` blocks; `before[n]` acts before the step number n, counted from 0."""

    def __init__(self, folder: Path, blocks: int, slots: int = 8) -> None:
        self.model = load(folder, slots=slots, tokens=blocks * BLOCK)
        self.window = Window(Budget(slots, blocks * BLOCK, packs=True))
        self.context = Context("w1", self.window, ServerClock())
        self.context.clock.set_to(NOW)
        self.rng = random.Random(17)
        self.made = self.steps = 0
        self.finished: dict[str, Finished] = {}
        self.ended_at: dict[str, int] = {}
        self.before: dict[int, Callable[[], object]] = {}
        self.engine = self.model.start_engine()
        self._step, self.engine.step = self.engine.step, self._watched
        self.runner = Runner(self.context, self.engine, self._finish)

    def job(self, tokens: int, most: int, priority: Priority = Priority.NORMAL, before: int = 0) -> ActiveJob:
        """A job with a prompt of `tokens` tokens, of which an earlier run has generated `before`."""
        self.made += 1
        claim = claim_of(priority=priority, at=NOW - 1_000 + self.made, op="generate")
        options = {"max_tokens": most, "ignore_eos": True}
        prompt = {"token_ids": Job.random(self.rng, tokens=tokens).prompt}
        assert claim.job
        row, earlier = self.model.prepare([prompt, prompt], options)
        said = Job.random(self.rng, tokens=before).prompt if before else []
        self.model.begin(row, claim.job.id, [earlier.features.add(Token(token)).record for token in said])
        return ActiveJob(claim, claim.job, [row])

    def run(self, *jobs: ActiveJob) -> None:
        self.window.hold(jobs)
        self.runner.run()

    def _watched(self) -> Step:
        self.before.pop(self.steps, lambda: None)()
        if not self.before:
            self.window.close()
        self.steps += 1
        step: Step = self._step()
        return step

    def _finish(self, finished: Finished) -> None:
        assert finished.address.name not in self.finished, "answered twice"
        self.finished[finished.address.name] = finished
        self.ended_at[finished.address.name] = self.steps

    def value(self, job: ActiveJob) -> Any:
        reply = self.finished[job.name].reply
        assert reply.error is None
        assert reply.values
        return reply.values[0]


def test_a_text_that_the_full_cache_displaced_keeps_no_other_from_its_blocks(folder: Path) -> None:
    bench = Bench(folder, blocks=8)
    long, displaced, short = bench.job(60, 250), bench.job(10, 220, Priority.BATCH), bench.job(10, 5)
    held_at: list[int] = []

    def hold_short() -> None:
        if displaced.displaced:
            bench.window.hold([short])
            held_at.append(bench.steps)
        else:
            bench.before[bench.steps + 1] = hold_short

    bench.before[0] = hold_short

    bench.run(long, displaced)

    assert bench.value(long)["usage"][1] == 250
    assert bench.value(displaced)["usage"][1] == 220
    assert bench.ended_at[short.name] - held_at[0] <= 10


def test_a_text_that_goes_on_here_is_admitted_when_the_cache_has_room_for_all_its_tokens(folder: Path) -> None:
    bench = Bench(folder, blocks=8)
    long, resumed = bench.job(200, 60), bench.job(10, 310, before=300)
    urgent = bench.job(10, 5, Priority.REALTIME)
    bench.before[1] = lambda: bench.window.hold([resumed])
    bench.before[4] = lambda: bench.window.hold([urgent])

    bench.run(long)

    assert [bench.value(job)["usage"][1] for job in (long, resumed, urgent)] == [60, 310, 5]
    assert bench.ended_at[urgent.name] <= 12
    # It held no slot meanwhile that the urgent text would have had to take from it.
    assert (long.displaced, resumed.displaced) == (0, 0)
    assert bench.ended_at[resumed.name] == bench.ended_at[long.name] + 10
