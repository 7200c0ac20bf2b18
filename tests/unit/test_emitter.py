"""Output of running jobs reaches the server once and in order, whatever fails meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import redis
from contracts.emit import deltas, partial, streaming
from contracts.emitting import Bench, active
from contracts.queue import names
from support import eventually

from millstream.broker.contract.job import Priority
from millstream.broker.contract.partial import Delta, Record, decode_records, encode_record, text_of
from millstream.broker.queue import streams as module
from millstream.broker.queue.stream_types import Emission
from millstream.worker.intake.emitter import AWAY_S, EVERY_S
from millstream.worker.scheduling.batcher import Budget


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_output_of_all_jobs_goes_out_in_one_call(bench: Bench) -> None:
    (one, first), (two, second) = bench.hold(), bench.hold()
    for text in ("a", "b"):
        bench.emitter.put(first, Record(text))
        bench.emitter.put(second, Record(text.upper()))

    assert bench.emitter.emit() == EVERY_S
    assert bench.emitter.emit() == EVERY_S

    assert bench.streams.calls == 1
    assert [text_of(decode_records(partial(bench.queue, each))) for each in (one, two)] == ["ab", "AB"]
    assert [delta.text for delta in deltas(bench.queue)] == ["ab", "AB"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_connection_makes_output_late_and_never_twice(bench: Bench, when: str) -> None:
    claim, job = bench.hold()
    setattr(bench.streams, when, [redis.exceptions.ConnectionError("cut")])
    bench.emitter.put(job, Record("a"))

    assert bench.emitter.emit() == AWAY_S
    bench.emitter.put(job, Record("ä"))
    bench.emitter.emit()
    bench.emitter.put(job, Record("b"))
    bench.emitter.emit()

    assert text_of(decode_records(partial(bench.queue, claim))) == "aäb"
    # Its offset tells the client which part it has.
    text = ""
    for delta in deltas(bench.queue):
        text = text[: delta.offset] + delta.text
    assert text == "aäb"


def test_a_job_that_was_taken_over_is_emitted_no_more_and_is_ended(bench: Bench) -> None:
    claim, job = bench.hold()
    bench.emitter.put(job, Record("a"))
    bench.emitter.emit()
    bench.queue.lease.release("w1", gone=True)
    (again,) = bench.queue.claim("w2").claims

    bench.emitter.put(job, Record("stale"))
    bench.emitter.emit()

    assert bench.lost == names([claim])
    assert text_of(decode_records(partial(bench.queue, again))) == "a"


def test_a_successor_goes_on_behind_what_was_emitted(bench: Bench) -> None:
    claim, job = bench.hold("dead")
    bench.queue.streams.emit("dead", [Emission(claim.address, 0, *emitted("äb"))])
    bench.queue.lease.release("dead", gone=True)
    (again,) = bench.queue.claim("w1").claims

    bench.emitter.put(active(again, partial(bench.queue, again)), Record("c"))
    bench.emitter.emit()

    assert text_of(decode_records(partial(bench.queue, again))) == "äbc"
    assert deltas(bench.queue)[-1] == (2, "c")
    assert job.name == names([again])[0]


def test_a_late_answer_does_not_count_for_the_next_run_of_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, job = bench.hold()
    bench.emitter.put(job, Record("a"))
    emit = bench.streams.emit

    def slow(consumer: str, emissions: Sequence[Emission]) -> list[int]:
        lengths = emit(consumer, emissions)
        # The job was given back before the answer came, and this worker claims it again.
        bench.emitter.forget([job.name])
        bench.queue.lease.release("w1", only=[job.name])
        (again,) = bench.queue.claim("w1").claims
        bench.emitter.put(active(again, partial(bench.queue, again)), Record("bc"))
        return lengths

    with monkeypatch.context() as patch:
        patch.setattr(bench.streams, "emit", slow)
        bench.emitter.emit()
    bench.emitter.emit()

    assert text_of(decode_records(partial(bench.queue, claim))) == "abc"
    assert deltas(bench.queue) == [(0, "a"), (1, "bc")]


def test_what_the_server_lost_is_sent_again(bench: Bench) -> None:
    claim, job = bench.hold()
    bench.emitter.put(job, Record("a"))
    bench.emitter.emit()
    bench.queue.client.delete(bench.queue.keys.partial(claim.address.job_id))

    bench.emitter.put(job, Record("b"))
    bench.emitter.emit()
    bench.emitter.emit()

    assert text_of(decode_records(partial(bench.queue, claim))) == "ab"


def test_records_are_bounded_and_the_reply_has_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.worker.intake.emitter.MAX_PARTIAL_BYTES", 30)
    claim, job = bench.hold()
    for text in "abcdef":
        bench.emitter.put(job, Record(text))
    bench.emitter.emit()

    # Nine bytes a record.
    assert text_of(decode_records(partial(bench.queue, claim))) == "abcd"


def test_what_ended_is_forgotten(bench: Bench) -> None:
    _, job = bench.hold()
    bench.emitter.put(job, Record("a"))

    bench.emitter.forget([job.name])
    bench.emitter.emit()

    assert bench.streams.calls == 0


def test_more_jobs_than_one_call_takes_all_get_their_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.worker.intake.emitter.MAX_JOBS_PER_CALL", 2)
    held = [bench.hold() for _ in range(5)]
    for _, job in held:
        bench.emitter.put(job, Record("a"))

    assert [bench.emitter.emit() for _ in range(4)] == [0.0, 0.0, EVERY_S, EVERY_S]

    assert [text_of(decode_records(partial(bench.queue, claim))) for claim, _ in held] == ["a"] * 5
    assert module.MAX_JOBS_PER_CALL == 128


def test_deaths_are_forgiven_to_a_run_that_made_a_record(bench: Bench) -> None:
    (claim,) = bench.queue.hold("dead", streaming())
    bench.queue.lease.release("dead", started=names([claim]), gone=True, how="killed")
    (again,) = bench.queue.claim("w1").claims
    job = active(again)
    for _ in range(3):
        bench.emitter.put(job, Record("a"))
        bench.emitter.emit()
    bench.queue.lease.release("w1", started=names([again]), gone=True, how="killed")

    (third,) = bench.queue.claim("w2").claims
    assert (again.attempts, third.attempts) == (1.0, 0.5)


def test_a_job_is_proven_once_the_server_has_its_output(bench: Bench) -> None:
    claim, job = bench.hold()
    window = bench.context.window
    window.use_slots(Budget(8, 1_000))
    window.hold([job])
    window.take(Budget(8, 1_000), wait=False)
    bench.streams.before = [redis.exceptions.ConnectionError("cut")]

    bench.emitter.put(job, Record("a"))
    bench.emitter.emit()
    assert not window.is_proven(claim.address.name)

    bench.emitter.emit()
    assert window.is_proven(claim.address.name)


def test_a_job_whose_output_has_no_room_on_the_server_keeps_no_suspect_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.worker.intake.emitter.MAX_PARTIAL_BYTES", 0)
    claim, job = bench.hold()
    window = bench.context.window
    window.use_slots(Budget(8, 1_000))
    window.hold([job])
    window.take(Budget(8, 1_000), wait=False)

    bench.emitter.put(job, Record("a"))

    assert window.is_proven(claim.address.name)


@pytest.mark.parametrize("kind", ["suspect", "realtime"])
def test_the_first_output_of_a_suspect_or_realtime_job_waits_for_no_other_emission(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("millstream.worker.intake.emitter.EVERY_S", 3600.0)
    claim, first = bench.hold()
    _, urgent = bench.hold(priority=Priority.REALTIME if kind == "realtime" else Priority.NORMAL)
    if kind == "suspect":
        urgent.claim = urgent.claim._replace(attempts=1.0)
    bench.emitter.start()
    try:
        bench.emitter.put(first, Record("a"))
        eventually(lambda: partial(bench.queue, claim))
        bench.emitter.put(urgent, Record("b"))
        eventually(lambda: len(deltas(bench.queue)) == 2)
    finally:
        bench.emitter.stop()
        bench.emitter.join()


def test_a_job_that_makes_no_record_any_more_is_charged_for_each_death(bench: Bench) -> None:
    (claim,) = bench.queue.hold("w1", streaming())
    bench.emitter.put(active(claim), Record("a"))
    bench.emitter.emit()
    attempts = []
    for worker in ("w1", "w2", "w3", "w4"):
        bench.queue.lease.release(worker, started=names([claim]), gone=True, how="killed")
        attempts += [each.attempts for each in bench.queue.claim(f"w{int(worker[1]) + 1}").claims]

    assert attempts == [0.5, 1.5, 2.5, 3.5]


def test_a_first_word_does_not_wait_for_the_texts_that_grow(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, grows), (_, begins) = bench.hold(), bench.hold()
    with never_due(bench, monkeypatch):
        bench.emitter.put(grows, Record("a"))
        eventually(lambda: deltas(bench.queue) == [(0, "a")])

        bench.emitter.put(grows, Record("b"))
        bench.emitter.put(begins, Record("A"))
        eventually(lambda: len(deltas(bench.queue)) == 3)

    assert [delta.text for delta in deltas(bench.queue)] == ["a", "b", "A"]
    assert bench.streams.calls == 2


def test_output_that_has_to_be_on_the_server_is_emitted_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, job = bench.hold()
    with never_due(bench, monkeypatch):
        bench.emitter.put(job, Record("a"))
        eventually(lambda: bench.streams.calls == 1)
        bench.emitter.put(job, Record("b"))

        assert bench.emitter.flush([job.name], 10.0)

    assert text_of(decode_records(partial(bench.queue, claim))) == "ab"


@contextmanager
def never_due(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emitter runs, and emits nothing again that can wait."""
    monkeypatch.setattr("millstream.worker.intake.emitter.EVERY_S", 60.0)
    monkeypatch.setattr("millstream.worker.intake.emitter.LATER_S", 60.0)
    bench.emitter.start()
    try:
        yield
    finally:
        bench.emitter.stop()
        bench.emitter.join(10.0)


def emitted(text: str) -> tuple[bytes, Delta, bool]:

    return encode_record(Record(text)), Delta(0, text), False
