"""Each claimed entry becomes rows to run or an answer, and none makes trouble for another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
from contracts.held import NOW, claim_of

from millstream.broker.config.load import Runtime
from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import (
    DeadlineExceeded,
    InputTooLong,
    InvalidRequest,
    MillstreamError,
    ModelFailed,
    UnsupportedVersion,
    WorkerLost,
)
from millstream.broker.contract.job import Address, Claim, Json
from millstream.broker.contract.partial import Record, encode_record
from millstream.worker.intake.intake import Intake
from millstream.worker.intake.settler import Finished
from millstream.worker.models.base import Prepared
from millstream.worker.models.custom import CustomModel, Hooks
from millstream.worker.models.echo import EchoModel
from millstream.worker.models.echo_stream import EchoStreamModel
from millstream.worker.supervision.progress import Progress, Snapshot, Stage


class Panic(BaseException):
    """As a library's Rust code raises where it panics: no Exception."""


class Recording(EchoModel):
    """Echo, but for inputs named "raise" and "panic"; remembers what it was asked to prepare."""

    def __init__(self) -> None:
        super().__init__(max_length=10)
        self.calls: list[tuple[list[Json], dict[str, Json]]] = []

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        self.calls.append((list(inputs), dict(options)))
        if "raise" in inputs:
            raise RuntimeError("the tokenizer")
        if "panic" in inputs:
            raise Panic("the tokenizer")
        prepared = super().prepare(inputs, options)
        return prepared[:-1] if "short" in inputs else prepared


@pytest.fixture
def model() -> Recording:
    return Recording()


@pytest.fixture
def intake(model: Recording) -> Intake:
    return Intake(model, max_attempts=3)


def only(intake: Intake, claim: Claim, now: int = NOW) -> Finished:
    """The answer of an entry that does not run."""
    held, finished = intake.admit([claim], now)
    assert held == []
    assert finished[0].address == claim.address
    return finished[0]


def test_a_good_job_is_held_with_its_rows(intake: Intake) -> None:
    (held,), finished = intake.admit([claim_of(["a b", "c"])], NOW)

    assert [row.tokens for row in held.prepared if isinstance(row, Prepared)] == [2, 1]
    assert finished == []


def test_rows_of_many_jobs_are_prepared_in_one_call_per_options(intake: Intake, model: Recording) -> None:
    claims = [claim_of(["a"]), claim_of(["b", "c"], options={"truncate": "end"}), claim_of(["d"])]

    held, _ = intake.admit(claims, NOW)

    assert model.calls == [(["a", "d"], {}), (["b", "c"], {"truncate": "end"})]
    assert {each.claim.address.job_id: len(each.prepared) for each in held} == {
        claim.address.job_id: claim.job.rows for claim in claims if claim.job
    }


def test_a_malformed_entry_is_buried_with_its_reason_and_its_caller_is_told(intake: Intake) -> None:
    finished = only(intake, Claim(Address("2:1-1", "0" * 32, "caller"), None, 0.0, "id is not hex"))

    assert finished.bury == "malformed: id is not hex"
    assert isinstance(finished.reply.error, InvalidRequest)


def test_an_entry_that_only_newer_workers_read_is_refused_as_such_and_kept_for_them(intake: Intake) -> None:
    address = Address("2:1-1", "0" * 32, "caller")
    finished = only(intake, Claim(address, None, 0.0, "the entry has version 2", newer=True))

    assert finished.bury == "newer version: the entry has version 2"
    assert isinstance(finished.reply.error, UnsupportedVersion)
    assert "update the workers" in finished.reply.error.hint


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"inputs":["a","b"]}', b'{"inputs":["\\ud800"]}'])
def test_a_malformed_body_is_buried_too(intake: Intake, body: bytes) -> None:
    assert only(intake, claim_of(body=body)).bury.startswith("malformed: ")


@pytest.mark.parametrize(("times", "phase"), [({"deadline": NOW}, "total"), ({"queue_by": NOW}, "queue")])
def test_a_job_past_its_time_is_answered_and_not_prepared(
    intake: Intake, model: Recording, times: dict[str, int], phase: str
) -> None:
    claim = claim_of(at=NOW - 250, **times)  # type: ignore[arg-type]

    finished = only(intake, claim)

    assert isinstance(finished.reply.error, DeadlineExceeded)
    assert (finished.reply.error.phase, finished.bury) == (phase, "")
    assert "250 ms" in str(finished.reply.error)
    assert model.calls == []
    assert intake.admit([claim], NOW - 1)[0]


def test_a_job_whose_worker_died_too_often_is_buried_before_it_kills_another(intake: Intake, model: Recording) -> None:
    assert intake.admit([claim_of(attempts=2.5)], NOW)[0]
    model.calls.clear()

    finished = only(intake, claim_of(attempts=3.0))

    assert isinstance(finished.reply.error, WorkerLost)
    assert finished.bury == "max_attempts"
    assert model.calls == []


def test_a_job_for_another_operation_is_refused(intake: Intake) -> None:
    finished = only(intake, claim_of(op="rerank"))

    assert isinstance(finished.reply.error, InvalidRequest)
    assert "'rerank'" in str(finished.reply.error)


def test_a_row_the_model_refuses_fails_alone(intake: Intake) -> None:
    (held,), finished = intake.admit([claim_of(["a", 5, "w " * 10, "b"])], NOW)

    assert [type(row) for row in held.prepared] == [Prepared, InvalidRequest, InputTooLong, Prepared]
    assert (held.rows_left, finished) == (2, [])


def test_a_job_of_refused_rows_only_is_answered_at_once(intake: Intake) -> None:
    reply = only(intake, claim_of([1, 2])).reply

    assert reply.error is None
    assert sorted(reply.errors) == [0, 1]


@pytest.mark.parametrize("guilty", ["raise", "panic", "short"])
def test_a_row_that_makes_prepare_fail_fails_alone(intake: Intake, guilty: str) -> None:
    rows: list[Json] = ["a", "b", "c", guilty, "d", "e", "f"]

    held, finished = intake.admit([claim_of(rows), claim_of(["g"])], NOW)

    assert finished == []
    assert [[isinstance(row, Prepared) for row in each.prepared] for each in held] == [
        [True, True, True, False, True, True, True],
        [True],
    ]
    assert isinstance(held[0].prepared[3], ModelFailed)


def test_what_is_read_and_prepared_is_on_the_page_until_it_was_handed_on(model: Recording) -> None:
    page = Progress.alone()
    intake = Intake(model, 3, lambda inputs, options: seen.append(page.snapshots()) or (), page.claimer)  # type: ignore[func-returns-value]
    claims = [claim_of(["a"]), claim_of(body=b"{"), claim_of(["b"])]
    seen: list[list[Snapshot]] = []
    read = intake._read

    def watched(place: int, claim: Claim, now: int, *, has_begun: bool) -> object:
        seen.append(page.snapshots())
        return read(place, claim, now, has_begun=has_begun)

    intake._read = watched  # type: ignore[method-assign,assignment]
    held, finished = intake.admit(claims, NOW)
    seen.append(page.snapshots())
    intake.end_admission()

    entries = [claim.address.name for claim in claims]
    assert (len(held), len(finished)) == (2, 1)
    assert [snapshot.stage for (snapshot,) in seen] == [Stage.CLAIM] * 3 + [Stage.PREPARE] * 3
    assert all(snapshot.entries == entries for (snapshot,) in seen)
    assert page.snapshots() == []


def test_a_model_that_prepares_row_by_row_charges_each_row_to_its_own_entry() -> None:
    page = Progress.alone()
    seen: list[tuple[Json, list[list[str]]]] = []

    def check(payload: Json) -> None:
        seen.append((payload, [snapshot.entries for snapshot in page.snapshots()]))
        if payload == "leave":
            raise SystemExit

    model = CustomModel(list.copy, "here:copy", Runtime(), None, Hooks(check=check))
    intake = Intake(model, 3, track=page.claimer)
    model.lap_by(intake.lap)
    jobs = {
        "a": claim_of(["a", "b"], op="call"),
        "leave": claim_of(["leave"], op="call"),
        "c": claim_of(["c"], op="call"),
    }

    intake.admit([claim_of(body=b"{", op="call"), *jobs.values()], NOW)
    at_the_end = [snapshot.entries for snapshot in page.snapshots()]

    owner = {"b": "a"}
    assert seen == [(each, [[jobs[owner.get(each, each)].address.name]]) for each in ("a", "b", "leave", "c")]
    assert len(at_the_end[0]) == 4


class Halved(EchoModel):
    """Prepares row by row, and not what is more than one row with a "raise" among them."""

    lap: Callable[[], None]

    def prepare(self, inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        rows = []
        for each in inputs:
            self.lap()
            rows += super().prepare([each], options)
            if each == "raise":
                raise RuntimeError("the tokenizer")
        return rows


def test_rows_that_are_prepared_again_are_charged_to_their_own_entries_again() -> None:
    page = Progress.alone()
    model = Halved()
    intake = Intake(model, 3, track=page.claimer)
    seen: list[str] = []

    def lap() -> None:
        intake.lap()
        seen.extend(entry for snapshot in page.snapshots() for entry in snapshot.entries)

    model.lap = lap
    claims = [claim_of([each]) for each in ("a", "raise", "b", "c")]
    intake.admit(claims, NOW)

    a, bad, b, c = (claim.address.name for claim in claims)
    assert seen == [a, bad, a, bad, a, bad, b, c]


def test_what_an_unknown_error_ended_the_process_over_stays_on_the_page(model: Recording) -> None:
    page = Progress.alone()
    intake = Intake(model, 3, lambda inputs, options: 1 / 0, page.claimer)  # type: ignore[arg-type,return-value]
    claim = claim_of(["a"])

    with pytest.raises(ZeroDivisionError):
        intake.admit([claim], NOW)

    assert [snapshot.entries for snapshot in page.snapshots()] == [[claim.address.name]]


def test_each_attempt_to_prepare_has_the_whole_stall_timeout(model: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Progress.alone()
    page.stall_s = 10.0
    intake = Intake(model, 3, track=page.claimer)
    now = 0.0
    stuck: list[bool] = []
    prepare = model.prepare

    def slow(inputs: Sequence[Json], options: Mapping[str, Json]) -> list[Prepared | MillstreamError]:
        nonlocal now
        now += 9.0
        stuck.append(page.is_stuck)
        return prepare(inputs, options)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    model.prepare = slow  # type: ignore[method-assign]
    intake.admit([claim_of(["a", "raise", "b"]), claim_of(["c"], options={"truncate": "end"})], NOW)

    assert stuck == [False] * len(model.calls)
    assert len(stuck) > 3


def test_every_entry_is_held_or_answered_once(intake: Intake) -> None:
    claims = [
        claim_of(),
        claim_of(op="rerank"),
        claim_of(deadline=1),
        claim_of(attempts=9),
        claim_of(body=b"{"),
        claim_of(["raise"]),
        claim_of(["a", "raise"], options={"x": [1, {"y": None}]}),
    ]

    held, finished = intake.admit(claims, NOW)

    entries = [each.claim.address for each in held] + [each.address for each in finished]
    assert sorted(address.entry for address in entries) == sorted(claim.address.entry for claim in claims)
    assert len(held) == 2


def test_no_depth_of_options_is_read_that_cannot_be_handled(intake: Intake) -> None:
    for depth in range(sys.getrecursionlimit() - 300, sys.getrecursionlimit()):
        body = b'{"inputs":["a"],"options":{"x":' + b"[" * depth + b"]" * depth + b"}}"

        held, finished = intake.admit([claim_of(body=body)], NOW)

        assert len(held) + len(finished) == 1


def speech(text: str, **times: int) -> Claim:
    """A job of a model that streams, which another worker held before."""
    claim = claim_of([text], **times)  # type: ignore[arg-type]
    assert claim.job
    job = claim.job._replace(op=EchoStreamModel.op)
    return claim._replace(job=job, given_back=True, address=claim.address._replace(streams=True))


def test_queue_time_of_a_text_ended_with_its_first_output_on_whichever_worker() -> None:
    intake, claim = Intake(EchoStreamModel(), max_attempts=3), speech("a b c", queue_by=NOW - 1)
    records = encode_record(Record("a "))

    (job,), finished = intake.admit([claim], NOW, {claim.address.name: records})
    _, waited = intake.admit([claim], NOW)

    assert (finished, job.records) == ([], records)
    assert isinstance(waited[0].reply.error, DeadlineExceeded)


def test_a_text_that_cannot_go_on_fails_alone() -> None:
    intake, good, bad = Intake(EchoStreamModel(), max_attempts=3), speech("a b"), speech("c d")

    (job,), finished = intake.admit([good, bad], NOW, {bad.address.name: b"cut"})

    assert job.claim == good
    assert [each.address for each in finished] == [bad.address]
    assert isinstance(finished[0].reply.errors[0], ModelFailed)


def test_a_job_of_a_model_that_streams_has_one_row() -> None:
    intake, claim = Intake(EchoStreamModel(), max_attempts=3), speech("a")
    assert claim.job
    two = claim._replace(job=claim.job._replace(rows=2, body=encode_inputs(["a", "b"], {})))

    finished = only(intake, two)

    assert isinstance(finished.reply.error, InvalidRequest)
