"""The main loop: one outcome a row, no forward for nothing, and no forward too late."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from contracts.held import NOW, claim_of, held_of
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import DeadlineExceeded, InvalidRequest, MillstreamError, ModelFailed
from millstream.broker.contract.job import Json, Vectors
from millstream.worker.clock import ServerClock
from millstream.worker.context import Context
from millstream.worker.engines.one_shot import OneShot, run_rows
from millstream.worker.engines.runner import Runner
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import NO_OPTIONS, Prepared
from millstream.worker.models.echo import EchoModel
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget, computed
from millstream.worker.scheduling.counters import Counters
from millstream.worker.shutdown import Ended
from millstream.worker.window import Window


class Fragile(EchoModel):
    """Echo, but a forward that holds one of `poison` fails in the way `how`; counts its forwards."""

    def __init__(self, poison: set[str] | None = None, how: str = "raise") -> None:
        super().__init__()
        self.poison = poison or set()
        self.how = how
        self.batches: list[list[str]] = []

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        self.batches.append([str(row.features) for row in rows])
        if self.poison & set(self.batches[-1]):
            if self.how == "raise":
                raise RuntimeError("CUDA error")
            return super().forward(rows)[1:]
        return super().forward(rows)


class Panic(BaseException):
    """As a library's Rust code raises where it panics: no Exception."""


class Dense:
    """Answers vectors; those of the rows named "nan" and "inf" are what they say."""

    op = "embed"
    fingerprint = "dense"
    sample_options = NO_OPTIONS

    def prepare(self, inputs: object, options: object) -> list[Prepared | MillstreamError]:
        raise NotImplementedError

    def samples(self, tokens: int) -> Sequence[Json]:
        raise NotImplementedError

    def forward(self, rows: Sequence[Prepared]) -> Vectors:
        values = [float(str(row.features)) for row in rows]
        return np.array([[value, 1.0] for value in values], dtype=np.float32)


def prepared(*features: str) -> list[Prepared]:
    return [Prepared(1, each) for each in features]


@pytest.mark.parametrize("how", ["raise", "count"])
@given(st.integers(1, 64), st.data())
def test_a_failing_forward_is_halved_until_the_guilty_rows_stand_alone(
    how: str, size: int, data: st.DataObject
) -> None:
    rows = [str(n) for n in range(size)]
    poison = set(data.draw(st.lists(st.sampled_from(rows), max_size=3)))
    model = Fragile(poison, how)

    outcomes = run_rows(model, prepared(*rows))

    assert [isinstance(outcome, ModelFailed) for outcome in outcomes] == [row in poison for row in rows]
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == [row for row in rows if row not in poison]
    assert len(model.batches) <= 1 + 2 * len(poison) * math.ceil(math.log2(size)) if size > 1 else 1


def test_each_forward_of_a_halved_batch_has_a_stall_timeout_of_its_own() -> None:
    model = Fragile({"b"})
    laps: list[int] = []

    run_rows(model, prepared("a", "b", "c", "d"), lambda: laps.append(len(model.batches)))

    # Before each forward but the first.
    assert laps == list(range(1, len(model.batches)))


def test_the_models_own_error_reaches_the_caller() -> None:
    class Refusing(EchoModel):
        def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
            raise InvalidRequest("no such language")

    (outcome,) = run_rows(Refusing(), prepared("a"))

    assert isinstance(outcome, InvalidRequest)


@pytest.mark.parametrize("answer", [None, 5, [], ["a", "b", "c"], np.full((2, 2), {})])
def test_an_answer_that_is_not_one_result_a_row_is_the_models_failure(answer: object) -> None:
    class Strange(EchoModel):
        def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
            return answer  # type: ignore[return-value]

    assert all(isinstance(outcome, ModelFailed) for outcome in run_rows(Strange(), prepared("a", "b")))


def test_a_row_of_nan_or_infinity_fails_alone() -> None:
    outcomes = run_rows(Dense(), prepared("1", "nan", "2", "inf"))

    assert [isinstance(outcome, ModelFailed) for outcome in outcomes] == [False, True, False, True]


@pytest.mark.parametrize("text", ["\ud800", "water \udfff"])
def test_a_text_that_is_no_unicode_fails_alone(text: str) -> None:
    outcomes = run_rows(EchoModel(), prepared("a", text, "b"))

    assert [isinstance(outcome, ModelFailed) for outcome in outcomes] == [False, True, False]


# -- memory --------------------------------------------------------------------------------------------------------


class Narrow(EchoModel):
    """Echo on a device that holds `fits` padded tokens, and none at all of the rows in `greedy`."""

    def __init__(self, fits: int, greedy: set[str] | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.fits = fits
        self.greedy = greedy or set()
        self.error = error or MemoryError()
        self.sizes: list[int] = []

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        self.sizes.append(len(rows))
        padded = max(row.tokens for row in rows) * len(rows)
        if padded > self.fits or self.greedy & {str(row.features) for row in rows}:
            raise self.error
        return super().forward(rows)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("no room"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_is_too_large_for_the_memory_runs_in_parts_and_what_fits_is_told(error: Exception) -> None:
    model, told = Narrow(16, error=error), list[int]()

    outcomes = run_rows(model, prepared(*map(str, range(64))), too_large=told.append)

    assert outcomes == [str(n) for n in range(64)]
    assert told == [16]
    assert model.sizes == [64, 32, 16, 16, 16, 16]


class NarrowPacker(Narrow):
    """The same for a model that packs: `fits` are the tokens it computes."""

    packs = True

    def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
        self.sizes.append(len(rows))
        if computed([row.tokens for row in rows], packs=True) > self.fits:
            raise MemoryError
        return EchoModel.forward(self, rows)


def test_what_fits_is_counted_as_the_model_lays_its_rows_out() -> None:
    model, told = NarrowPacker(300), list[int]()
    lengths = [150, *[1] * 100] * 2
    rows = [Prepared(tokens, "a") for tokens in lengths]

    run_rows(model, rows, too_large=told.append)

    assert told == [computed(lengths[:101], packs=True)]
    assert computed(lengths[:101], packs=False) > 50 * told[0]


@given(fits=st.integers(1, 64), size=st.integers(1, 64), greedy=st.sets(st.integers(0, 63), max_size=2))
def test_without_memory_for_all_each_row_that_fits_runs_in_bounded_work(fits: int, size: int, greedy: set[int]) -> None:
    model, told = Narrow(fits, {str(n) for n in greedy}), list[int]()

    outcomes = run_rows(model, prepared(*map(str, range(size))), too_large=told.append)

    assert [isinstance(each, ModelFailed) for each in outcomes] == [n in greedy for n in range(size)]
    # What fits is never underestimated by a row's own fault, nor overestimated.
    assert all(min(fits, size) // 2 <= most <= fits for most in told)
    assert not greedy or told == [] or fits < size
    assert len(told) <= 1
    if not greedy:
        assert sum(model.sizes) <= 3 * size
        assert bool(told) == (fits < size)


def test_a_row_that_no_memory_holds_says_nothing_of_how_much_fits() -> None:
    model, told = Narrow(64, {"41"}), list[int]()

    outcomes = run_rows(model, prepared(*map(str, range(64))), too_large=told.append)

    assert [n for n, each in enumerate(outcomes) if isinstance(each, ModelFailed)] == [41]
    assert (told, sum(model.sizes) <= 3 * 64) == ([], True)


def test_an_error_that_cannot_be_read_fails_its_row_and_no_more() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    model = Narrow(64, {"2"}, Unspeakable())

    outcomes = run_rows(model, prepared("1", "2", "3"))

    assert [isinstance(each, ModelFailed) for each in outcomes] == [False, True, False]


def test_a_failed_forward_is_not_kept_alive_while_its_parts_run() -> None:
    class Big: ...

    class Holding(EchoModel):
        left: weakref.ref[Big] | None = None

        def forward(self, rows: Sequence[Prepared]) -> Vectors | list[Json]:
            assert self.left is None or self.left() is None, "the failed forward's memory is still taken"
            taken = Big()
            self.left = weakref.ref(taken)
            if len(rows) > 1:
                raise MemoryError
            return super().forward(rows)

    assert run_rows(Holding(), prepared("a", "b", "c")) == ["a", "b", "c"]


def test_a_score_of_nan_or_infinity_fails_alone() -> None:
    class Scoring(Dense):
        def forward(self, rows: Sequence[Prepared]) -> list[Json]:  # type: ignore[override]
            return [float(str(row.features)) for row in rows]

    outcomes = run_rows(Scoring(), prepared("1", "nan", "0", "-inf"))

    assert [outcomes[0], outcomes[2]] == [1.0, 0.0]
    assert [isinstance(outcome, ModelFailed) for outcome in outcomes] == [False, True, False, True]


# -- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A runner over a window that is closed: `run` runs what was put and returns."""

    model: Fragile = field(default_factory=Fragile)
    window: Window = field(default_factory=lambda: Window(Budget(rows=8, tokens=1_000)))
    clock: ServerClock = field(default_factory=ServerClock)
    counters: Counters = field(default_factory=Counters)
    finished: dict[str, Finished] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock.set_to(NOW)
        self.context = Context("w1", self.window, self.clock, self.counters)

    def finish(self, finished: Finished) -> None:
        assert finished.address.job_id not in self.finished, "answered twice"
        self.finished[finished.address.job_id] = finished

    def run(self, *jobs: ActiveJob) -> None:
        self.run_with(self.model, *jobs)

    def run_with(self, model: EchoModel, *jobs: ActiveJob) -> None:
        self.window.hold(jobs)
        self.window.close()
        Runner(self.context, OneShot(model, self.context.progress.runner.lap, self.window.cost), self.finish).run()

    def error_of(self, held: ActiveJob) -> MillstreamError | None:
        return self.finished[held.claim.address.job_id].reply.error


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_every_job_is_answered_once_with_its_own_rows(bench: Bench) -> None:
    jobs = [held_of([3] * size) for size in (1, 5, 12, 2)]

    bench.run(*jobs)

    assert {job.claim.address.job_id: len(job.prepared) for job in jobs} == {
        job_id: len(finished.reply.values or []) for job_id, finished in bench.finished.items()
    }
    assert bench.finished[jobs[1].claim.address.job_id].reply.values == [f"row {n}" for n in range(5)]


def test_rows_whose_answer_is_kept_under_one_name_run_once(bench: Bench) -> None:
    one, two, unnamed = held_of([3, 3]), held_of([3, 3, 3]), held_of([3])
    one.digests, two.digests = ["p", "q"], ["q", "", "p"]

    bench.run(one, two, unnamed)

    # As they are named here, and not as they are: the first one with a name answers for all.
    assert [bench.finished[each.claim.address.job_id].reply.values for each in (one, two, unnamed)] == [
        ["row 0", "row 1"],
        ["row 1", "row 1", "row 0"],
        ["row 0"],
    ]
    assert sorted(bench.model.batches[0]) == ["row 0", "row 0", "row 1", "row 1"]
    assert bench.counters.rows == 4


@pytest.mark.parametrize("times", [{"deadline": NOW - 1}, {"queue_by": NOW - 1}])
def test_no_forward_starts_for_a_job_past_its_time(bench: Bench, times: dict[str, int]) -> None:
    late = held_of([3, 3], claim_of(["x", "x"], **times))  # type: ignore[arg-type]
    good = held_of([3])

    bench.run(late, good)

    assert sum(len(batch) for batch in bench.model.batches) == 1
    error = bench.error_of(late)
    assert isinstance(error, DeadlineExceeded)
    assert error.phase == ("total" if "deadline" in times else "queue")
    assert bench.error_of(good) is None


def test_with_every_job_late_the_model_is_left_alone(bench: Bench) -> None:
    bench.run(*[held_of([3], claim_of(deadline=1)) for _ in range(20)])

    assert (bench.model.batches, len(bench.finished)) == ([], 20)


def test_queue_time_ends_with_a_jobs_first_forward(bench: Bench) -> None:
    job = held_of([3] * 20, claim_of(["x"] * 20, queue_by=NOW + 60_000))
    forward = bench.model.forward

    def slow_forward(rows: Sequence[Prepared]) -> Vectors | list[Json]:
        bench.clock.set_to(NOW + 120_000)
        return forward(rows)

    bench.model.forward = slow_forward  # type: ignore[method-assign]
    bench.run(job)

    assert bench.error_of(job) is None
    assert len(bench.model.batches) > 1


def test_a_deadline_ends_a_job_between_two_of_its_forwards(bench: Bench) -> None:
    job = held_of([3] * 20, claim_of(["x"] * 20, deadline=NOW + 60_000))
    forward = bench.model.forward

    def slow_forward(rows: Sequence[Prepared]) -> Vectors | list[Json]:
        bench.clock.set_to(NOW + 120_000)
        return forward(rows)

    bench.model.forward = slow_forward  # type: ignore[method-assign]
    bench.run(job)

    assert isinstance(bench.error_of(job), DeadlineExceeded)
    assert len(bench.model.batches) == 1


def test_a_poisoned_row_spares_its_neighbours_in_the_batch(bench: Bench) -> None:
    bench.model.poison = {"row 1"}
    good, bad = held_of([3]), held_of([3, 3])

    bench.run(good, bad)

    assert bench.finished[good.claim.address.job_id].reply.errors == {}
    assert list(bench.finished[bad.claim.address.job_id].reply.errors) == [1]
    assert bench.finished[bad.claim.address.job_id].reply.values == ["row 0"]


def test_what_runs_is_on_the_page_from_its_forward_until_its_reply_is_handed_on(bench: Bench) -> None:
    job = held_of([3])
    seen: list[list[str]] = []
    forward, finish = bench.model.forward, bench.finish

    def watched(rows: Sequence[Prepared]) -> Vectors | list[Json]:
        seen.append(bench.context.progress.running())
        return forward(rows)

    def watched_finish(finished: Finished) -> None:
        seen.append(bench.context.progress.running())
        finish(finished)

    bench.model.forward = watched  # type: ignore[method-assign]
    bench.finish = watched_finish  # type: ignore[method-assign]
    bench.run(job)

    assert seen == [[job.name], [job.name]]
    assert bench.context.progress.running() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Panic])
def test_whatever_a_forward_raises_fails_its_own_rows_alone(bench: Bench, error: type[BaseException]) -> None:
    forward = bench.model.forward

    def raising(rows: Sequence[Prepared]) -> Vectors | list[Json]:
        if any(row.features == "row 1" for row in rows):
            raise error("mine")
        return forward(rows)

    bench.model.forward = raising  # type: ignore[method-assign]
    job = held_of([3, 3, 3])
    bench.run(job)

    reply = bench.finished[job.claim.address.job_id].reply
    assert {at: str(each) for at, each in reply.errors.items()} == {1: f"{error.__name__}: mine"}
    assert reply.values == ["row 0", "row 2"]


def test_a_signal_that_ends_the_process_is_no_fault_of_the_rows_it_interrupts(bench: Bench) -> None:
    def interrupted(rows: Sequence[Prepared]) -> Vectors | list[Json]:
        raise Ended

    bench.model.forward = interrupted  # type: ignore[method-assign]

    with pytest.raises(Ended):
        bench.run(held_of([3, 3]))
    assert bench.finished == {}


def test_each_forward_is_counted_by_what_ended_its_batch_and_no_other_is(bench: Bench) -> None:
    late = held_of([3], claim_of(deadline=1))

    bench.run(late, held_of([3] * 20))

    assert bench.counters.cuts == {"rows": 2, "tokens": 0, "time": 0, "padding": 0, "arrival": 1}
    assert bench.counters.forwards == 3
    assert bench.counters.fields()["cut_rows"] == 2


def test_what_it_did_is_counted_and_told(bench: Bench) -> None:
    job = held_of([10, 4], claim_of(["x", "x"], at=NOW - 500))

    bench.run(job)

    count = bench.counters
    assert (count.forwards, count.rows, count.tokens, count.padded, count.errors) == (1, 2, 14, 20, 0)
    assert count.cuts == {"rows": 0, "tokens": 0, "time": 0, "padding": 0, "arrival": 1}
    assert bench.window.cost.seconds_per_token > 0
    timings = bench.finished[job.claim.address.job_id].reply.timings
    assert timings["queue"] >= 500
    assert timings["inference"] >= 0


def test_the_threads_are_chosen_by_the_time_of_each_forward(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, float]] = []
    monkeypatch.setattr(bench.context.threads, "observe", lambda *forward: timed.append(forward))

    bench.run(held_of([10, 4]), held_of([3] * 20))

    assert len(timed) == bench.counters.forwards == 3
    assert sum(tokens for tokens, _ in timed) == bench.counters.padded
    assert all(seconds > 0 for _, seconds in timed)


def test_the_next_batch_begins_with_what_fitted_and_a_push_does_not_undo_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = Narrow(8)
    bench.window.limit(32, 1_000, None)

    bench.run_with(narrow, held_of([1] * 32), held_of([1] * 32))

    assert narrow.sizes == [32, 16, 8, 8, 8, 8, *[8] * 4]
    assert caplog.text.count("out of memory: batches hold at most 8 tokens from now on") == 1
    bench.window.limit(64, 4_096, None)
    assert (bench.window.budget.rows, bench.window.budget.tokens) == (64, 8)
