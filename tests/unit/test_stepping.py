"""The main loop with an engine whose rows grow: rows join and leave while others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from contracts.held import NOW, claim_of

from millstream.broker.contract.errors import DeadlineExceeded, ModelFailed
from millstream.broker.contract.job import Json
from millstream.broker.contract.partial import Record
from millstream.worker.clock import ServerClock
from millstream.worker.context import Context
from millstream.worker.engines.base import Step
from millstream.worker.engines.runner import Runner
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Prepared
from millstream.worker.models.echo_stream import BEGAN, EchoStreamEngine, EchoStreamModel
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window


class Shown:
    """Output of the runner, by the name of its job. The server has it at once."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.records: dict[str, list[Record]] = {}
        self.forgotten: list[str] = []

    def put(self, job: ActiveJob, record: Record) -> None:
        assert job.name not in self.forgotten, "output after the end"
        self.records.setdefault(job.name, []).append(record)
        self.window.prove([job.name])

    def forget(self, names: Sequence[str]) -> None:
        self.forgotten += names

    def text(self, job: ActiveJob) -> str:
        return "".join(record.text for record in self.records.get(job.name, []))


class Bench:
    """A runner over an engine with `slots`; `before[n]` acts before the step number n, counted from 0."""

    def __init__(self, slots: int = 4, habits: str = "") -> None:
        self.model = EchoStreamModel(habits, slots)
        self.window = Window(Budget(rows=8, tokens=1_000))
        self.context = Context("w1", self.window, ServerClock())
        self.context.clock.set_to(NOW)
        self.shown = Shown(self.window)
        self.finished: dict[str, Finished] = {}
        self.before: dict[int, Callable[[], object]] = {}
        self.running: list[int] = []
        self.made = 0

    def job(self, text: str, limit: int | None = None, **times: int) -> ActiveJob:
        # Jobs run in the order in which they were made.
        self.made += 1
        claim = claim_of([text], at=NOW - 1000 + self.made, **times)  # type: ignore[arg-type]
        assert claim.job
        (row,) = self.model.prepare([text], {} if limit is None else {"max_tokens": limit})
        return ActiveJob(claim, claim.job, [row])

    def run(self, *jobs: ActiveJob) -> None:
        self.window.hold(jobs)
        if not self.before:
            self.window.close()
        engine = self.model.start_engine()
        step = engine.step

        def watched() -> Step:
            self.running.append(len(engine._rows))
            self.before.pop(len(self.running) - 1, lambda: None)()
            if not self.before:
                self.window.close()
            return step()

        engine.step = watched  # type: ignore[method-assign]
        Runner(self.context, engine, self.finish, self.shown).run()

    def finish(self, finished: Finished) -> None:
        assert finished.address.name not in self.finished, "answered twice"
        self.finished[finished.address.name] = finished

    def value(self, job: ActiveJob) -> Json:
        reply = self.finished[job.name].reply
        assert reply.error is None
        assert reply.values
        return reply.values[0]


def said(text: str, reason: str = "stop", began: Sequence[int] = (0,)) -> Json:
    return {"text": text, "finish_reason": reason, "began": list(began)}


def test_rows_of_different_lengths_end_each_in_its_own_step() -> None:
    bench = Bench()
    one, three = bench.job("a"), bench.job("a b c")

    bench.run(one, three)

    assert (bench.value(one), bench.value(three)) == (said("a"), said("a b c"))
    assert bench.running == [2, 1, 1]
    assert bench.shown.text(three).startswith("a b ")
    assert bench.context.progress.running() == []
    assert bench.window.empty is False
    bench.window.forget([one.name, three.name])
    assert bench.window.empty


def test_a_row_that_comes_later_takes_the_slot_that_is_free() -> None:
    bench = Bench(slots=2)
    jobs = [bench.job("a b c"), bench.job("a"), bench.job("a b")]

    bench.run(*jobs)

    assert [bench.value(job) for job in jobs] == [said("a b c"), said("a"), said("a b")]
    assert bench.running == [2, 2, 2]


def test_a_job_that_arrives_while_others_run_joins_them() -> None:
    bench = Bench()
    first, second = bench.job("a b c d"), bench.job("x y")
    bench.before[1] = lambda: bench.window.hold([second])

    bench.run(first)

    assert (bench.value(first), bench.value(second)) == (said("a b c d"), said("x y"))
    assert bench.running == [1, 1, 2, 2]


def test_what_runs_is_on_the_page_as_rows_come_and_go() -> None:
    bench = Bench()
    long, short = bench.job("a b c"), bench.job("a")
    seen: list[list[str]] = []
    bench.before = {at: lambda: seen.append(sorted(bench.context.progress.running())) for at in range(3)}

    bench.run(long, short)

    assert seen == [sorted([long.name, short.name]), [long.name], [long.name]]


def test_a_job_that_is_cancelled_while_it_runs_leaves_its_slot() -> None:
    bench = Bench(slots=1)
    unwanted, waiting = bench.job("a b c d e f"), bench.job("x")
    bench.before[1] = lambda: bench.window.cancel([unwanted.name])

    bench.run(unwanted, waiting)

    assert list(bench.finished) == [waiting.name]
    assert bench.running == [1, 1, 1]
    assert unwanted.name in bench.shown.forgotten


def test_a_job_past_its_time_does_not_start() -> None:
    bench = Bench()
    late, good = bench.job("a", deadline=NOW - 1), bench.job("b")

    bench.run(late, good)

    assert isinstance(bench.finished[late.name].reply.error, DeadlineExceeded)
    assert bench.value(good) == said("b")


def test_output_ends_at_its_limit() -> None:
    bench = Bench()
    job = bench.job("a b c", limit=2)

    bench.run(job)

    assert bench.value(job) == said("a b ", "length")


def test_a_run_goes_on_behind_what_was_said_and_says_where_it_began() -> None:
    bench = Bench()
    job = bench.job("a b c d")
    (row,) = job.prepared
    assert isinstance(row, Prepared)
    bench.model.begin(row, "0" * 32, [Record("a ", BEGAN), Record("b ")])

    bench.run(job)

    assert bench.value(job) == said("a b c d", began=[0, 2])
    assert bench.shown.records[job.name][0] == Record("c ", BEGAN)


def test_a_fault_of_one_row_ends_that_row_alone() -> None:
    bench = Bench(habits="raise:poison")
    good, bad = bench.job("a b c"), bench.job("a poison")

    bench.run(good, bad)

    assert bench.value(good) == said("a b c")
    assert isinstance(bench.finished[bad.name].reply.errors[0], ModelFailed)


def test_a_fault_of_the_engine_ends_the_rows_that_it_holds_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(slots=2)
    held, later = [bench.job("a b"), bench.job("c d")], bench.job("e")

    def fail() -> None:
        raise RuntimeError("the cache is gone")

    bench.before[1] = fail
    bench.run(*held, later)

    assert all(isinstance(bench.finished[job.name].reply.errors[0], ModelFailed) for job in held)
    assert bench.value(later) == said("e")


def test_a_stepping_model_runs_rows_as_a_whole_for_tests() -> None:
    model = EchoStreamModel(slots=2)
    rows = [row for row in model.prepare(["a b", "c", ""], {}) if isinstance(row, Prepared)]

    assert model.forward(rows) == [said("a b"), said("c"), said("")]


def test_an_engine_has_room_for_its_free_slots() -> None:
    engine = EchoStreamModel(slots=3).start_engine()
    assert isinstance(engine, EchoStreamEngine)

    assert engine.room() == Budget(3, 10**9)


def test_a_suspect_may_join_rows_that_have_output_and_none_that_have_not() -> None:
    bench = Bench()
    rests: list[bool] = []
    for at in range(3):
        bench.before[at] = lambda: rests.append(bench.window.wait_until_at_rest(0.0))

    bench.run(bench.job("a b c"))

    # Not before its first record.
    assert rests == [False, True, True]


def test_suspects_are_claimed_beside_rows_that_have_output(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    rooms: list[bool] = []
    for at in range(2):
        bench.before[at] = lambda: rooms.append(bench.window.suspect_room(2, 2) is not None)

    bench.run(bench.job("a b c"))

    assert rooms == [False, True]


def test_pieces_of_a_text_and_the_texts_of_each_forward_are_counted() -> None:
    bench = Bench()
    jobs = [bench.job("a b c"), bench.job("a")]

    bench.run(*jobs)

    histograms = bench.context.histograms
    assert sum(histograms["first_token"].counts) == len(jobs)
    assert sum(histograms["between_tokens"].counts) == 2
    assert histograms["batch_rows"].total == sum(bench.running)
