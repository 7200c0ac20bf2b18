"""Rows that grow have slots: they are cut at their time, leave for more urgent rows, and go on where they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from contracts.held import NOW, claim_of
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.broker.contract.errors import DeadlineExceeded, ModelFailed
from millstream.broker.contract.job import PRIORITIES, Json, Priority
from millstream.broker.contract.partial import Record, encode_record
from millstream.worker.clock import ServerClock
from millstream.worker.context import Context
from millstream.worker.engines import slot_keeper
from millstream.worker.engines.base import Step
from millstream.worker.engines.runner import Runner
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Prepared
from millstream.worker.models.echo_stream import EchoStreamModel
from millstream.worker.scheduling.active_job import BY_SHARE, SUSPECT, ActiveJob, Outcome, Rows
from millstream.worker.scheduling.batcher import Budget, Row
from millstream.worker.scheduling.displacement import PROGRESS, Candidate, displaced
from millstream.worker.window import Window

REALTIME, NORMAL, BATCH = Priority.REALTIME, Priority.NORMAL, Priority.BATCH


class Emitted:
    """Output by the name of its job; a job whose text ended or moved gets no more.

    The server has it at once, or from the `late`-th call of `put` on.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.text: dict[str, str] = {}
        self.late = 0
        self.forgotten: list[str] = []

    def put(self, job: ActiveJob, record: Record) -> None:
        assert job.name not in self.forgotten, "output after the end"
        self.text[job.name] = self.text.get(job.name, "") + record.text
        self.late -= 1
        if self.late <= 0:
            self.window.prove([job.name])

    def forget(self, names: Sequence[str]) -> None:
        self.forgotten += names


class Given:
    """Jobs that were given back."""

    def __init__(self) -> None:
        self.is_due = self.others = self.drains = False
        self.jobs: list[ActiveJob] = []

    def note_drain(self) -> None:
        self.drains = True

    def has_others(self) -> bool:
        return self.others

    def put(self, jobs: Sequence[ActiveJob]) -> None:
        self.jobs += jobs


class Bench:
    """A runner over an engine with `slots`; `before[n]` acts before the step number n, counted from 0."""

    def __init__(self, slots: int = 2, reserved: int = 0) -> None:
        self.model = EchoStreamModel(slots=slots)
        self.window = Window(Budget(rows=8, tokens=1_000))
        self.context = Context("w1", self.window, ServerClock())
        self.context.clock.set_to(NOW)
        self.emitted, self.given = Emitted(self.window), Given()
        self.finished: dict[str, Finished] = {}
        self.before: dict[int, Callable[[], object]] = {}
        self.running: list[list[str]] = []
        self.limits: dict[Priority, float | None] = {}
        self.made = 0
        self.engine = self.model.start_engine()
        self._step, self.engine.step = self.engine.step, self.watched  # type: ignore[method-assign]
        self.runner = Runner(self.context, self.engine, self.finish, self.emitted, self.limits, self.given)
        self.window.limit(8, 1_000, None, reserved_slots=reserved)

    def job(self, text: str, priority: Priority = NORMAL, *, attempts: float = 0.0, **times: int) -> ActiveJob:
        self.made += 1
        claim = claim_of([text], priority=priority, at=NOW - 1000 + self.made, attempts=attempts, **times)  # type: ignore[arg-type]
        assert claim.job
        (row,) = self.model.prepare([text], {})
        return ActiveJob(claim, claim.job, [row])

    def words(self, letter: str, count: int) -> str:
        return " ".join(f"{letter}{at}" for at in range(count))

    def watched(self) -> Step:
        self.running.append([str(row.payload.features.words[0]).strip() for row in self.engine._rows])  # type: ignore[attr-defined]
        self.before.pop(len(self.running) - 1, lambda: None)()
        if not self.before:
            self.window.close()
        return self._step()

    def run(self, *jobs: ActiveJob) -> None:
        self.window.hold(jobs)
        if not self.before:
            self.window.close()
        self.runner.run()

    def finish(self, finished: Finished) -> None:
        assert finished.address.name not in self.finished, "answered twice"
        self.finished[finished.address.name] = finished

    def value(self, job: ActiveJob) -> dict[str, Json]:
        reply = self.finished[job.name].reply
        assert reply.error is None
        assert reply.values
        assert isinstance(reply.values[0], dict)
        return reply.values[0]

    def whole(self, job: ActiveJob) -> bool:
        """Whether the text of the job is complete, and was shown in order and once."""
        text = str(self.value(job)["text"])
        return self.value(job)["finish_reason"] == "stop" and text.startswith(self.emitted.text.get(job.name, ""))


# -- time limits ---------------------------------------------------------------------------------------------------


def test_a_text_past_its_deadline_ends_in_the_next_step_with_its_text_so_far() -> None:
    bench = Bench()
    late, other = bench.job("a b c d e f", deadline=NOW + 50), bench.job("x y z v")
    bench.before[2] = lambda: bench.context.clock.set_to(NOW + 60)

    bench.run(late, other)

    assert (bench.value(late)["text"], bench.value(late)["finish_reason"]) == ("a b c ", "deadline")
    assert bench.running[3] == ["x"]
    assert bench.whole(other)
    assert late.name in bench.emitted.forgotten


def test_a_text_that_is_too_long_in_the_model_ends_with_its_text_so_far() -> None:
    bench = Bench()
    bench.limits.update({NORMAL: 5.0, BATCH: None})
    late, other = bench.job("a b c d"), bench.job("x y z v", BATCH)

    def age() -> None:
        for job in (late, other):
            assert job.running_since
            job.running_since -= 6.0

    bench.before[1] = age
    bench.run(late, other)

    assert (bench.value(late)["text"], bench.value(late)["finish_reason"]) == ("a b ", "deadline")
    assert bench.whole(other)


def test_a_displaced_text_past_its_deadline_ends_with_its_text_so_far_though_it_has_no_slot() -> None:
    bench = Bench(slots=1)
    late, urgent = bench.job("a b c d", BATCH, deadline=NOW + 50), bench.job(bench.words("x", 20), REALTIME)
    bench.before[1] = lambda: bench.window.hold([urgent])
    bench.before[5] = lambda: bench.context.clock.set_to(NOW + 60)

    bench.run(late)

    assert (bench.value(late)["text"], bench.value(late)["finish_reason"]) == ("a b ", "deadline")
    assert next(iter(bench.finished)) == late.name
    assert bench.whole(urgent)


def test_a_text_that_another_worker_began_ends_with_its_text_if_its_deadline_is_over() -> None:
    bench = Bench()
    job = bench.job("a b c d", deadline=NOW - 1)
    (row,) = job.prepared
    assert isinstance(row, Prepared)
    job.records = encode_record(Record("a "))
    bench.model.begin(row, "0" * 32, [Record("a ")])

    bench.run(job)

    assert (bench.value(job)["text"], bench.value(job)["finish_reason"]) == ("a ", "deadline")
    # No forward started for it.
    assert bench.running == []


def begun(bench: Bench, text: str, output: str, **times: int) -> ActiveJob:
    """A batch job that another worker has given back after `output`."""
    job = bench.job(text, BATCH, **times)
    (row,) = job.prepared
    assert isinstance(row, Prepared)
    job.records = encode_record(Record(output))
    bench.model.begin(row, "0" * 32, [Record(output)])
    return job


def test_a_text_that_another_worker_began_ends_at_its_deadline_though_it_gets_no_slot() -> None:
    bench = Bench(slots=1)
    urgent, late = bench.job(bench.words("x", 20), REALTIME), begun(bench, "a b c d", "a ", deadline=NOW + 50)
    bench.before[1] = lambda: bench.window.hold([late])
    bench.before[3] = lambda: bench.context.clock.set_to(NOW + 60)

    bench.run(urgent)

    assert (bench.value(late)["text"], bench.value(late)["finish_reason"]) == ("a ", "deadline")
    assert next(iter(bench.finished)) == late.name
    assert bench.whole(urgent)
    assert len(bench.running) == 20


def test_a_job_that_has_not_begun_expires_with_an_error() -> None:
    bench = Bench(slots=1)
    first, late = bench.job("a b c d"), bench.job("x", queue_by=NOW + 50)
    bench.before[1] = lambda: bench.context.clock.set_to(NOW + 60)

    bench.run(first, late)

    error = bench.finished[late.name].reply.error
    assert isinstance(error, DeadlineExceeded)
    assert error.phase == "queue"


def test_a_fault_of_the_engine_that_concludes_is_the_error_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    late, other = bench.job("a b c d", deadline=NOW + 50), bench.job("x y z v")

    def fail(rows: Rows, reason: str) -> Sequence[Outcome]:
        raise RuntimeError("the tokenizer is gone")

    monkeypatch.setattr(bench.engine, "conclude", fail)
    bench.before[1] = lambda: bench.context.clock.set_to(NOW + 60)
    bench.run(late, other)

    assert isinstance(bench.finished[late.name].reply.errors[0], ModelFailed)
    assert bench.whole(other)


def test_a_cancelled_text_leaves_its_slot_to_the_next_row_in_the_next_step() -> None:
    bench = Bench(slots=1)
    unwanted, waiting = bench.job("a b c d e f"), bench.job("x")
    bench.before[1] = lambda: bench.window.cancel([unwanted.name])

    bench.run(unwanted, waiting)

    assert bench.running == [["a"], ["a"], ["x"]]
    assert unwanted.name in bench.emitted.forgotten


# -- more urgent rows ----------------------------------------------------------------------------------------------


def test_a_more_urgent_row_takes_the_slot_of_the_youngest_of_the_least_urgent_which_goes_on_later() -> None:
    bench = Bench(slots=3)
    normal, old, young = bench.job("n " * 9, NORMAL), bench.job("o " * 9, BATCH), bench.job("y " * 9, BATCH)
    urgent = bench.job("u u", REALTIME)
    bench.before[3] = lambda: bench.window.hold([urgent])

    bench.run(normal, old, young)

    assert [sorted(rows) for rows in bench.running[3:7]] == [
        ["n", "o", "y"],
        ["n", "o", "u"],
        ["n", "o", "u"],
        ["n", "o", "y"],
    ]
    assert all(bench.whole(job) for job in (normal, old, young, urgent))
    assert bench.value(young)["began"] == [0, 4]
    assert young.name not in bench.emitted.forgotten[:1]


def test_equal_rows_displace_nothing_and_a_row_by_share_neither() -> None:
    bench = Bench(slots=1)
    first, equal, shared = bench.job("a b c", BATCH), bench.job("x", BATCH), bench.job("s", BATCH)
    bench.before[0] = lambda: (bench.window.hold([equal, shared]), bench.window.spend_share(BATCH, 1))

    bench.run(first)

    assert [row for (row,) in bench.running] == ["a", "a", "a", "x", "s"]


def test_a_displaced_row_makes_progress_however_many_urgent_rows_come() -> None:
    bench = Bench(slots=1)
    victim = bench.job(bench.words("v", 3 * PROGRESS), BATCH)

    def hold_urgent() -> None:
        if bench.running[-1] == ["v0"]:
            bench.window.hold([bench.job("u", REALTIME)])

    bench.before = dict.fromkeys(range(4 * PROGRESS), hold_urgent)

    bench.run(victim)

    assert bench.whole(victim)
    assert len(bench.value(victim)["began"]) <= 4  # type: ignore[arg-type]
    assert victim.displaced >= 3


def test_reserved_slots_are_for_realtime_rows() -> None:
    bench = Bench(slots=3, reserved=1)
    urgent = bench.job("u", REALTIME)
    normal = bench.job("n", NORMAL)
    texts = [bench.job(bench.words(letter, 4), BATCH) for letter in "pqr"]
    bench.before[1] = lambda: bench.window.hold([urgent])
    bench.before[2] = lambda: bench.window.hold([normal])

    bench.run(*texts)

    assert [len(rows) for rows in bench.running[:4]] == [2, 2, 3, 2]
    # A normal row does not get the reserved slot: it displaces a batch row.
    assert bench.running[3] == ["p0", "n"]
    assert all(bench.whole(job) for job in (*texts, urgent, normal))


def test_rows_that_the_engine_displaced_go_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(slots=2)
    first, second = bench.job("a b c d"), bench.job("x y z v")
    step = bench._step

    def full() -> Step:
        made = step()
        if len(bench.running) != 2:
            return made
        rows = [row for row in bench.engine._rows if row.owner == second.name]
        bench.engine.abort(rows)
        return made._replace(displaced=rows)

    bench._step = full
    bench.run(first, second)

    assert bench.whole(first)
    assert bench.whole(second)
    assert bench.value(second)["began"] == [0, 2]
    assert second.displaced == 1


def test_a_displaced_row_that_is_cancelled_is_forgotten() -> None:
    bench = Bench(slots=1)
    victim, urgent = bench.job("a b c d", BATCH), bench.job("u v w x", REALTIME)
    bench.before[1] = lambda: bench.window.hold([urgent])
    bench.before[3] = lambda: bench.window.cancel([victim.name])

    bench.run(victim)

    assert list(bench.finished) == [urgent.name]
    assert victim.name in bench.emitted.forgotten


def test_a_suspect_takes_a_slot_of_its_own_class_since_others_wait_for_its_output() -> None:
    bench = Bench(slots=1)
    text, suspect = bench.job("a b c d", BATCH), bench.job("s t", BATCH, attempts=1.0)

    aside = bench.window.set_aside()
    bench.before[1] = lambda: (bench.window.hold([suspect]), aside.__enter__())
    bench.before[3] = lambda: aside.__exit__(None, None, None)
    bench.run(text)

    assert [row for (row,) in bench.running] == ["a", "a", "s", "s", "a", "a"]
    assert bench.whole(text)
    assert bench.whole(suspect)


def test_no_row_joins_a_suspect_before_it_has_output(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(slots=4)
    suspect, other = bench.job("s t u", attempts=1.0), bench.job("a b")
    say, silent = bench.engine._say, ["s ", "s ", "s "]

    def says_late(speech: Any) -> Record | None:
        if speech.words[0] in silent:
            silent.remove(speech.words[0])
            return None
        return say(speech)

    monkeypatch.setattr(bench.engine, "_say", says_late)

    # Not set aside, as in a drain.
    bench.run(suspect, other)

    assert bench.running == [["s"], ["s"], ["s"], ["s"], ["s", "a"], ["s", "a"]]
    assert bench.whole(suspect)
    assert bench.whole(other)


def test_no_row_joins_a_suspect_before_the_server_has_its_output() -> None:
    bench = Bench(slots=4)
    # Until then its death is charged to it, whoever caused it.
    suspect, other = bench.job("s t u", attempts=1.0), bench.job("p q", attempts=1.0)
    bench.emitted.late = 2

    bench.before[1] = lambda: bench.window.hold([other])
    bench.run(suspect)

    assert bench.running == [["s"], ["s"], ["s", "p"], ["p"]]
    assert bench.whole(other)


def test_what_waits_is_on_no_page() -> None:
    bench = Bench(slots=1)
    victim, urgent = bench.job("a b c d", BATCH), bench.job("u v w x", REALTIME)
    bench.before[1] = lambda: bench.window.hold([urgent])
    seen: list[list[str]] = []
    bench.before[2] = lambda: seen.append(bench.context.progress.running())

    bench.run(victim)

    assert seen == [[urgent.name]]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_each_text_is_complete_and_shown_once_whatever_comes_and_leaves(data: st.DataObject) -> None:
    bench = Bench(slots=data.draw(st.integers(1, 3)), reserved=data.draw(st.integers(0, 1)))
    count = data.draw(st.integers(1, 10))
    jobs = [
        bench.job(bench.words("w", data.draw(st.integers(1, 40))), data.draw(st.sampled_from(PRIORITIES)))
        for _ in range(count)
    ]
    arrivals: dict[int, list[ActiveJob]] = {}
    for job in jobs[1:]:
        arrivals.setdefault(data.draw(st.integers(1, 30)), []).append(job)
    cancelled = data.draw(st.sets(st.sampled_from(jobs), max_size=2))
    cancels = {data.draw(st.integers(1, 40)): job for job in cancelled}
    full = data.draw(st.sets(st.integers(1, 60), max_size=8))
    step = bench._step

    def made() -> Step:
        now = len(bench.running)
        bench.window.hold(arrivals.pop(now, []))
        if job := cancels.pop(now, None):
            bench.window.cancel([job.name])
        if not (arrivals or cancels):
            bench.window.close()
        result = step()
        rows = bench.engine._rows[-1:] if now in full else []
        bench.engine.abort(rows)
        return result._replace(displaced=rows)

    bench._step = made
    # It arrives late, and makes the engine step until all others have arrived.
    last = bench.job(bench.words("l", 120), REALTIME)
    bench.window.hold([last, jobs[0]])
    bench.runner.run()

    for job in [last, *jobs]:
        assert job in cancelled or (bench.whole(job) and job.name in bench.emitted.forgotten)
        if job.name in bench.finished:
            text = str(bench.value(job)["text"])
            # The last record is not lost either: a record that completes a row is shown with it.
            assert bench.emitted.text[job.name] == text
    assert not bench.window.waiting
    assert bench.context.progress.running() == []


# -- to other workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [True, False])
def test_a_row_that_was_displaced_for_long_is_given_back_if_another_worker_lives(
    others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_keeper, "AWAY_S", 0.0)
    bench = Bench(slots=1)
    bench.given.others = others
    victim, urgent = bench.job("a b c d", BATCH), bench.job("u v w x", REALTIME)
    bench.before[1] = lambda: bench.window.hold([urgent])

    bench.run(victim)

    assert [job.name for job in bench.given.jobs] == ([victim.name] if others else [])
    assert (victim.name in bench.finished) != others
    # Its output is not dropped: it may still have to reach the server.
    assert (victim.name in bench.emitted.forgotten) != others


def test_a_worker_that_drains_gives_back_all_that_it_holds_when_it_is_due() -> None:
    bench = Bench(slots=1)
    running, waiting = bench.job("a b c d"), bench.job("x")

    def drain() -> None:
        bench.window.close()

    bench.before[1] = drain
    bench.before[2] = lambda: setattr(bench.given, "is_due", True)
    bench.run(running, waiting)

    assert sorted(job.name for job in bench.given.jobs) == sorted([running.name, waiting.name])
    assert len(bench.running) == 3
    assert (bench.given.drains, bench.finished) == (True, {})
    assert not bench.window.waiting
    assert bench.context.progress.running() == []


# -- the choice ----------------------------------------------------------------------------------------------------


def candidate(
    priority: int, age: int, *, rank: int | None = None, records: int = 99, before: bool = False
) -> Candidate:
    row = Row(1, (priority if rank is None else rank, age, 0), f"{priority + 1}:{age}-0", 0, Prepared(1, ""))
    return Candidate(row, records, before, records > 0)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=8, unique_by=lambda each: each[1]),
    st.lists(st.integers(0, 3), max_size=8),
)
def test_no_row_leaves_for_one_that_may_not_displace_it(running: list[tuple[int, int]], claimants: list[int]) -> None:
    candidates = [candidate(*each) for each in running]

    leaving = displaced(candidates, claimants)

    assert len(leaving) <= len(claimants)
    left = [each.row for each in candidates if each.row not in leaving]
    for row in leaving:
        for other in left:
            assert (int(other.owner[0]), other.urgency[1]) < (int(row.owner[0]), row.urgency[1])
    if len(leaving) < sum(1 for floor in claimants if floor < len(PRIORITIES)) and left:
        assert max(int(row.owner[0]) - 1 for row in left) < max(claimants)


@pytest.mark.parametrize(
    ("each", "leaves"),
    [
        (candidate(2, 1), True),
        (candidate(2, 1, records=0), True),
        (candidate(2, 1, records=PROGRESS - 1, before=True), False),
        (candidate(2, 1, records=PROGRESS, before=True), True),
        (candidate(2, 1, rank=BY_SHARE, records=PROGRESS - 1), False),
        (candidate(2, 1, rank=BY_SHARE, records=PROGRESS), True),
        (candidate(2, 1, rank=SUSPECT, records=0), False),
        (candidate(2, 1, rank=SUSPECT, records=1), True),
    ],
)
def test_a_row_keeps_its_slot_until_it_has_made_progress(each: Candidate, leaves: bool) -> None:
    assert bool(displaced([each], [1])) == leaves


# -- claims --------------------------------------------------------------------------------------------------------


def rows_running(bench: Bench, *priorities: Priority) -> None:
    """Makes rows of these priorities run."""
    bench.window.hold([bench.job("a b", priority) for priority in priorities])
    rows: Rows = []
    while bench.window.waiting:
        taken = bench.window.take(Budget(8 - len(rows), 10**9), wait=False)
        assert taken
        rows += taken
        bench.window.complete([], [], rows)
        bench.window.prove([row.owner for row in rows])


def test_a_worker_claims_what_its_free_slots_take_and_a_little_more() -> None:
    bench = Bench(slots=8)

    rows_running(bench, NORMAL, BATCH, BATCH)
    room = bench.window.room(2)
    bench.window.hold([bench.job("w")] * 1)
    fuller = bench.window.room(2)

    assert room
    assert (room.rows, room.next_rows) == (6, 3)
    assert fuller
    assert fuller.rows == 5
    bench.window.hold([bench.job(letter) for letter in "abcd"])
    assert bench.window.room(2) is None


def test_a_worker_whose_slots_are_busy_claims_only_what_displaces_running_rows() -> None:
    bench = Bench(slots=8)
    rows_running(bench, *[BATCH] * 2, *[NORMAL] * 3, *[REALTIME] * 3)

    room = bench.window.urgent_room()
    assert bench.window.room(2) is None
    assert room
    assert (room.rows, room.streams) == (2, 2)
    bench.window.hold([bench.job("n", NORMAL), bench.job("n", NORMAL)])
    room = bench.window.urgent_room()
    assert room
    assert (room.rows, room.streams) == (5, 1)
    bench.window.hold([bench.job("u", REALTIME) for _ in range(5)])
    assert bench.window.urgent_room() is None


def test_reserved_slots_have_room_for_realtime_jobs_only() -> None:
    bench = Bench(slots=8, reserved=2)
    rows_running(bench, *[BATCH] * 6)

    room = bench.window.urgent_room()

    assert bench.window.room(1) is None
    assert room
    # Six batch rows may be displaced, by realtime or normal jobs.
    assert (room.rows, room.streams) == (6, 2)


def test_a_row_that_the_engine_has_no_tokens_for_waits_and_displaces_one_less_urgent_row() -> None:
    bench = Bench(slots=8)
    rows_running(bench, BATCH, NORMAL)
    bench.window.hold([bench.job("a " * 50, NORMAL)])

    assert bench.window.take(Budget(6, 40), wait=False) == []
    assert bench.window.claimants(Budget(6, 40)) == [2]
    assert bench.window.claimants(Budget(6, 60)) == []
    assert len(bench.window.take(Budget(6, 60), wait=False)) == 1


def test_no_less_urgent_row_takes_the_tokens_that_a_more_urgent_one_waits_for() -> None:
    bench = Bench(slots=4)
    room = bench.engine.room

    def in_tokens() -> Budget | None:
        held = sum(row.tokens for row in bench.engine._rows)
        full = room()
        return full and Budget(full.rows, 60 - held, packs=True)

    bench.engine.room = in_tokens  # type: ignore[method-assign]
    texts = [bench.job(bench.words(letter, 30), BATCH) for letter in "pq"]
    urgent = bench.job(bench.words("u", 50), REALTIME)
    bench.before[2] = lambda: bench.window.hold([urgent])

    bench.run(*texts)

    assert [len(bench.value(text)["began"]) for text in texts] == [2, 2]  # type: ignore[arg-type]
    first = next(at for at, rows in enumerate(bench.running) if "u0" in rows)
    assert first <= 5
    assert all(bench.whole(job) for job in (*texts, urgent))


def test_a_worker_claims_again_after_rows_that_took_all_tokens_of_the_engine_have_ended() -> None:
    bench = Bench(slots=4)
    bench.window.hold([bench.job("a b c d e", BATCH), bench.job("v w x y z", BATCH)])
    rows = bench.window.take(Budget(4, 10, packs=True))
    bench.window.complete([], [], rows)
    full = bench.window.room()
    bench.window.complete(rows, [{}, {}])

    # No row waits: the runner only says what the engine has room for now.
    assert bench.window.take(Budget(4, 10, packs=True), wait=False) == []

    assert full is None
    room = bench.window.room()
    assert room
    assert (room.tokens, room.streams) == (10, len(PRIORITIES))


def test_a_lane_that_gets_no_turn_any_more_claims_again_after_rows_that_took_all_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(slots=4)
    monkeypatch.setattr(bench.engine, "room", lambda: Budget(4 - len(bench.engine._rows), 5 - 5 * bench.engine.busy))
    bench.before[99] = lambda: None
    bench.window.hold([bench.job("a b c d e", BATCH)])

    assert bench.runner.turn()
    full = bench.window.room()
    while bench.engine.busy:
        bench.runner.turn()

    # Nothing waits and nothing runs: a process of several lanes asks this one no more.
    assert bench.runner.urgency is None
    assert full is None
    assert bench.window.room()


def test_a_worker_without_free_slots_waits_until_a_row_leaves_one() -> None:
    bench = Bench(slots=1)
    bench.window.hold([bench.job("a b")])
    (row,) = bench.window.take(Budget(1, 10**9), wait=False)

    began = time.monotonic()
    assert not bench.window.wait_for_take(0.02)
    assert time.monotonic() - began >= 0.02
    takes = bench.window.takes
    bench.window.complete([row], [{}])

    assert bench.window.takes > takes
    assert bench.window.wait_for_take(0.0)
