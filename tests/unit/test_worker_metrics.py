"""What a worker counts reaches the metrics of its service once, whatever its heartbeats meet."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import cast

import fakeredis
import pytest
import redis
from contracts.held import NOW, claim_of, held_of
from contracts.queue import Queue, draft, names
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.contract.errors import InputTooLong, MillstreamError, ModelFailed
from millstream.broker.contract.job import PRIORITIES, Claim, Priority, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.contract.metrics import HISTOGRAMS, TIMES_MS, bucket_fields
from millstream.broker.queue.lease import NO_PACKAGE, Beat, Lease, Package
from millstream.worker.context import Context
from millstream.worker.engines.one_shot import OneShot
from millstream.worker.engines.runner import Runner
from millstream.worker.intake.heartbeat import Heartbeat, Watch
from millstream.worker.intake.settler import Finished, Settler
from millstream.worker.models.echo import EchoModel
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.histograms import MOST_WAITING, Histograms
from millstream.worker.scheduling.packages import REPEATED_S, Packages
from millstream.worker.window import Window

# -- packages --------------------------------------------------------------------------------------------------------


def test_a_package_has_what_was_counted_since_the_last_one() -> None:
    counts = {"a": 1}
    packages = Packages(lambda: counts)

    first = packages.next(0.0)
    packages.confirm(first)
    counts |= {"a": 4, "b": 2}
    second = packages.next(1.0)
    packages.confirm(second)

    assert (first, second) == (Package(1, {"a": 1}), Package(2, {"a": 3, "b": 2}))
    assert packages.next(2.0) is NO_PACKAGE


def test_a_package_that_was_not_confirmed_is_sent_again_unchanged() -> None:
    counts = {"a": 1}
    packages = Packages(lambda: counts)
    first = packages.next(0.0)
    counts["a"] = 5

    assert packages.next(1.0) is first
    packages.confirm(first)

    assert packages.next(2.0) == Package(2, {"a": 4})


def test_a_package_whose_number_the_server_may_have_forgotten_counts_as_added() -> None:
    counts = {"a": 1}
    packages = Packages(lambda: counts)
    first = packages.next(0.0)
    counts["a"] = 5

    assert packages.next(REPEATED_S) is first
    assert packages.next(REPEATED_S + 0.1) == Package(2, {"a": 4})


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["reached", "lost before", "lost after"]))))
def test_whatever_is_lost_on_the_way_each_count_is_added_once(beats: list[tuple[int, str]]) -> None:
    counts, added, last = {"a": 0}, 0, 0
    packages = Packages(lambda: counts)

    for more, fate in [*beats, (0, "reached"), (0, "reached")]:
        counts["a"] += more
        package = packages.next(0.0)
        # As the script does.
        if fate != "lost before" and package.number > last:
            added, last = added + package.counts["a"], package.number
        if fate == "reached":
            packages.confirm(package)

    assert added == counts["a"]


# -- heartbeats ------------------------------------------------------------------------------------------------------


class Cut:
    """A lease whose heartbeats fail in turn, `before` they reach the server or `after` it."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.fates: list[str] = []

    def beat(self, *args: object) -> Beat:
        fate = self.fates.pop(0) if self.fates else ""
        if fate == "before":
            raise redis.exceptions.ConnectionError("cut")
        beat = self._lease.beat(*args)  # type: ignore[arg-type]
        if fate == "after":
            raise redis.exceptions.TimeoutError("cut")
        return beat

    def reclaim(self) -> int:
        return 0


class Mill:
    """A lane's counters with its heartbeat and settler, whose threads are the test's."""

    def __init__(self) -> None:
        self.queue = Queue(fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2), ServiceKeys("echo"))
        self.queue.open()
        self.context = Context("w1", Window(Budget(rows=8, tokens=100)))
        self.lease = Cut(self.queue.lease)
        watch = Watch(lambda: {"state": "ready"}, lambda beat: None, lambda: None, lambda: False)
        self.heartbeat = Heartbeat(self.context, cast(Lease, self.lease), watch)

    def hold(self, *rows: int) -> list[Claim]:
        claims = self.queue.hold("w1", *[draft(each) for each in rows])
        self.context.window.keep(names(claims))
        self.context.clock.set_to(self.queue.now())
        return claims

    def settle(self, *finished: Finished) -> None:
        settler = Settler(self.context, self.queue.streams)
        for each in finished:
            settler.put(each)
        settler.finish()
        settler.run()
        self.context.shutdown.check()


@pytest.fixture
def mill() -> Mill:
    return Mill()


@pytest.mark.parametrize("fates", [["before"], ["after"], ["after", "before", "after"]])
def test_a_heartbeat_that_is_sent_again_adds_nothing_twice(mill: Mill, fates: list[str]) -> None:
    mill.context.counters.rows = 5
    mill.lease.fates = list(fates)

    for _ in fates:
        mill.heartbeat.beat()
        mill.context.counters.rows += 1
    mill.heartbeat.beat()
    mill.heartbeat.beat()

    assert mill.queue.totals().work["rows"] == 5 + len(fates)


def test_a_worker_that_drains_sends_its_last_counts(mill: Mill) -> None:
    mill.context.counters.rows = 5
    mill.lease.fates = ["after"]
    mill.heartbeat.beat()
    mill.context.counters.rows = 8

    mill.heartbeat.flush()

    assert mill.queue.totals().work["rows"] == 8


def test_a_worker_drains_while_the_server_is_away(mill: Mill) -> None:
    mill.context.counters.rows = 5
    mill.lease.fates = ["before"]

    mill.heartbeat.flush()

    assert mill.lease.fates == []
    assert mill.queue.totals().work["rows"] == 0


# -- what is counted -------------------------------------------------------------------------------------------------


def test_rows_are_counted_with_their_jobs_answer(mill: Mill) -> None:
    whole, part, none = mill.hold(2, 3, 4)

    class OwnError(MillstreamError):
        code = "of-a-user"

    mill.settle(
        Finished(whole.address, Reply(values=["a", "b"], tokens=7)),
        Finished(part.address, Reply(values=["a"], errors={0: InputTooLong("long"), 2: OwnError("own")})),
        Finished(none.address, Reply(error=ModelFailed("no")), bury="max_attempts"),
    )

    totals = mill.queue.totals()
    assert (totals.settled, totals.ok) == (3, 3)
    assert totals.failed == {"error": 1, "input_too_long": 1, "model_failed": 4}
    assert totals.buried == {"max_attempts": 1}
    assert mill.context.counters.tokens_in == 7


def test_an_answer_that_cannot_be_encoded_or_is_too_large_counts_as_failed(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.broker.queue.streams.MAX_REPLY_BYTES", 1000)
    odd, large = mill.hold(2, 3)

    mill.settle(
        Finished(odd.address, Reply(values=[{"no JSON"}, "b"])),  # type: ignore[list-item]
        Finished(large.address, Reply(values=["x" * 2000] * 3)),
    )

    assert mill.queue.totals().failed == {"model_failed": 2, "reply_too_large": 3}


def test_times_are_those_of_answered_jobs_that_ran_and_of_no_others(mill: Mill) -> None:
    ran, never, late = mill.hold(1, 1, 1)
    mill.queue.settle([late])
    mill.context.clock.set_to(ran.address.at + 300)
    timings = {"queue": 20.0, "inference": 7.0}

    mill.settle(
        Finished(ran.address, Reply(values=["a"], timings=timings)),
        Finished(never.address, Reply(error=ModelFailed("no"))),
        Finished(late.address, Reply(values=["a"], timings=timings)),
    )

    histograms = mill.context.histograms
    assert histograms["inference"].total == 7.0
    assert histograms["wait:normal"].total == 20.0
    assert histograms["total:normal"].total == pytest.approx(300.0, abs=50.0)
    assert [sum(histograms[f"total:{priority}"].counts) for priority in Priority] == [0, 1, 0]
    assert mill.context.counters.late == 1


def test_tokens_of_generated_texts_are_those_of_their_usage(mill: Mill) -> None:
    whole, bare, odd = (claim._replace(address=claim.address._replace(streams=True)) for claim in mill.hold(1, 1, 1))

    mill.settle(
        Finished(whole.address, Reply(values=[{"text": "a b", "finish_reason": "stop", "usage": [5, 2, 3]}], tokens=5)),
        Finished(bare.address, Reply(values=["text"], tokens=1)),
        Finished(odd.address, Reply(values=[{"usage": "many"}], tokens=1)),
    )

    count = mill.context.counters
    assert (count.tokens_in, count.tokens_out, count.tokens_reused) == (7, 2, 3)


def test_a_forward_is_counted_with_its_rows_tokens_and_padding() -> None:
    window = Window(Budget(rows=8, tokens=100))
    context = Context("w1", window)
    window.hold([held_of((2, 4)), held_of((4,))])
    window.close()

    Runner(context, OneShot(EchoModel()), lambda finished: None).run()

    assert context.counters.padding_tokens == 2
    assert context.histograms["batch_rows"].total == 3
    assert context.histograms["batch_tokens"].total == 12
    assert context.histograms["padding"].total == pytest.approx(1.2)
    assert context.counts()["work:padding_tokens"] == 2


def test_the_first_piece_of_a_text_counts_from_acceptance_and_the_others_from_the_one_before() -> None:
    histograms, job = Histograms(), held_of(claim=claim_of(at=NOW))

    histograms.add_output(job, NOW + 40, 10.0)
    histograms.add_output(job, NOW + 90, 10.05)

    assert histograms["first_token"].total == 40
    assert job.first_output_at == NOW + 40
    assert histograms["between_tokens"].total == pytest.approx(50.0)


def test_a_text_that_goes_on_after_another_worker_has_no_first_piece_here() -> None:
    histograms, job = Histograms(), held_of(claim=claim_of(at=NOW))
    job.records = b"of an earlier run"

    histograms.add_output(job, NOW + 40, 10.0)

    assert sum(histograms["first_token"].counts) == 0


def test_values_are_counted_in_time_and_none_is_lost_however_many_there_are() -> None:
    histograms = Histograms()
    rows = 2 * MOST_WAITING + 7

    for number in range(rows):
        histograms.add_forward(1 + number % 4, 10, 0)
    read = [histograms["batch_rows"] for _ in range(2)]

    assert [each.counts.sum() for each in read] == [rows, rows]
    assert histograms["batch_tokens"].total == 10 * rows
    assert histograms["padding"].counts.sum() == 0


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("123"), st.integers(-5, 400_000), st.floats(0.0, 4e5)), max_size=300),
        max_size=6,
    )
)
def test_histograms_of_answers_have_each_value_in_its_bucket(calls: list[list[tuple[str, int, float]]]) -> None:
    """Against one bisection a value."""
    histograms, expected = Histograms(), Counter[str]()

    for call in calls:
        answers = histograms.answers()
        for stream, ms, s in call:
            answers[stream].extend((max(0, ms), ms, s))
            priority = PRIORITIES[int(stream) - 1]
            for name, value in ((f"wait:{priority}", max(0, ms)), (f"total:{priority}", max(0, ms)), ("inference", s)):
                expected[bucket_fields(name)[bisect_left(TIMES_MS, value)]] += 1
            expected[bucket_fields("latency")[bisect_left(HISTOGRAMS["latency"], max(0, ms))]] += 1

    found = histograms.counts()
    assert {field: count for field, count in found.items() if not field.endswith(":sum")} == expected
    assert found.get("inference:sum", 0) == pytest.approx(1000 * sum(s for call in calls for *_, s in call), abs=1)
