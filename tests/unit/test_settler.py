"""Answers are written, many a call, each by itself; what cannot be sent is its own job's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, cast

import fakeredis
import pytest
import redis
from contracts.queue import Queue, draft, ids, names

from millstream.broker.contract.codec import decode_reply, encode_reply
from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Claim, Json, Reply
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Settled, Settlement
from millstream.broker.queue.streams import MAX_JOBS_PER_CALL, Streams
from millstream.worker.context import Context
from millstream.worker.intake import settler as module
from millstream.worker.intake.settler import Finished, Settler
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.scheduling.counters import Counters
from millstream.worker.shutdown import Shutdown
from millstream.worker.stage_gate import Stage as StageWrapper
from millstream.worker.stage_gate import StageGate
from millstream.worker.supervision.progress import Snapshot, Stage
from millstream.worker.window import Window


class Watched:
    """Streams that remember the size of each call, and fail where told to."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.calls: list[int] = []
        self.faults: list[Exception] = []
        self.on_settle: Callable[[], None] = lambda: None

    def settle(self, settlements: list[Settlement]) -> list[Settled]:
        self.calls.append(len(settlements))
        self.on_settle()
        outcomes = self._streams.settle(settlements)
        if self.faults:
            raise self.faults.pop()
        return outcomes


class Keeping:
    """Notes what a keeper is asked to do."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.on_encode: Callable[[], None] = lambda: None

    def encoded(self, finished: Finished) -> list[tuple[str, bytes]]:
        self.on_encode()
        return [(f"{finished.reply.values}", b"")]

    def write(self, answers: Sequence[tuple[str, bytes]]) -> None:
        self.order += [f"kept {name}" for name, _ in answers]


class Bench:
    """A settler whose thread is the test's: `settle` returns when all was written."""

    def __init__(self, keeper: Keeping | None = None, stage: StageWrapper | None = None) -> None:
        client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2)
        self.queue = Queue(client, ServiceKeys("echo"))
        self.queue.open()
        self.streams = Watched(self.queue.streams)
        self.window = Window(Budget(rows=8, tokens=100))
        self.counters = Counters()
        self.shutdown = Shutdown()
        self.context = Context("w1", self.window, counters=self.counters, shutdown=self.shutdown, stage=stage)
        self.settler = Settler(self.context, cast(Streams, self.streams), keeper)

    def hold(self, count: int) -> list[Claim]:
        claims: list[Claim] = []
        while len(claims) < count:
            claims += self.queue.hold("w1", *[draft() for _ in range(min(100, count - len(claims)))])
        self.window.keep(names(claims))
        return claims

    def settle(self, *finished: Finished) -> None:
        for each in finished:
            self.settler.put(each)
        self.settler.finish()
        self.settler.run()
        self.shutdown.check()

    def replies(self) -> dict[str, Reply]:
        return {job_id: decode_reply(reply) for job_id, reply in self.queue.replies()}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_every_answer_is_written_in_few_calls_and_its_entry_forgotten(bench: Bench) -> None:
    claims = bench.hold(2 * MAX_JOBS_PER_CALL + 1)

    bench.settle(*[Finished(claim.address, Reply(values=[claim.address.job_id])) for claim in claims])

    assert {job_id: reply.values for job_id, reply in bench.replies().items()} == {
        job_id: [job_id] for job_id in ids(claims)
    }
    assert bench.streams.calls == [MAX_JOBS_PER_CALL, MAX_JOBS_PER_CALL, 1]
    assert (bench.window.names(), bench.counters.jobs) == ([], len(claims))


def test_large_answers_go_in_calls_of_their_own(bench: Bench) -> None:
    claims = bench.hold(3)

    bench.settle(*[Finished(claim.address, Reply(values=["x" * 2_000_000])) for claim in claims])

    assert bench.streams.calls == [1, 1, 1]


def test_answers_are_kept_before_they_are_written() -> None:
    keeper = Keeping()
    bench = Bench(keeper)
    bench.streams.on_settle = lambda: keeper.order.append("settled")

    bench.settle(
        *[Finished(claim.address, Reply(values=[at]), digests=["d"]) for at, claim in enumerate(bench.hold(2))]
    )

    assert keeper.order == ["kept [0]", "kept [1]", "settled"]


def test_each_answer_is_on_the_page_while_it_is_encoded_for_the_cache() -> None:
    keeper = Keeping()
    bench = Bench(keeper)
    claims = bench.hold(2)
    seen: list[tuple[Stage, list[str]]] = []
    keeper.on_encode = lambda: seen.extend(
        (snapshot.stage, snapshot.entries) for snapshot in bench.context.progress.snapshots()
    )

    bench.settle(*[Finished(claim.address, Reply(values=["a"]), digests=["d"]) for claim in claims])

    assert seen == [(Stage.SETTLE, [name]) for name in names(claims)]


class Hostile(dict[str, Json]):
    """A result with code of its own, which runs as it is encoded."""

    def items(self) -> NoReturn:
        raise SystemExit("mine")


@pytest.mark.parametrize(
    "value", [object(), "\ud800", {1j: 2}, Hostile(a=1)], ids=["object", "surrogate", "key", "its own code"]
)
def test_an_answer_that_cannot_be_sent_is_its_own_jobs_error(bench: Bench, value: Json) -> None:
    bad, good = bench.hold(2)

    bench.settle(Finished(bad.address, Reply(values=[value])), Finished(good.address, Reply(values=["fine"])))

    assert isinstance(bench.replies()[bad.address.job_id].error, ModelFailed)
    assert bench.replies()[good.address.job_id].values == ["fine"]


def test_each_answer_is_on_the_page_while_it_is_encoded_and_not_while_it_waits_for_the_server(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = bench.hold(3)
    seen: list[Sequence[Snapshot]] = []

    def encode(reply: Reply) -> bytes:
        seen.append(bench.context.progress.snapshots())
        return encode_reply(reply)

    monkeypatch.setattr(module, "encode_reply", encode)
    bench.streams.on_settle = lambda: seen.append(bench.context.progress.snapshots())
    bench.settle(*[Finished(claim.address, Reply(values=["a"]), digests=["d"]) for claim in claims])

    *encoding, writing = seen
    assert [(snapshot.stage, snapshot.entries) for (snapshot,) in encoding] == [
        (Stage.SETTLE, [name]) for name in names(claims)
    ]
    assert writing == []


def test_an_answer_behind_a_large_one_waits_for_the_next_call_and_is_charged_with_nothing_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = bench.hold(2)
    seen: list[list[str]] = []
    bench.streams.on_settle = lambda: seen.append(
        [each for snapshot in bench.context.progress.snapshots() for each in snapshot.entries]
    )

    bench.settle(Finished(large.address, Reply(values=["x" * 2_000_000])), Finished(small.address, Reply(values=["a"])))

    assert bench.streams.calls == [1, 1]
    assert seen == [[], []]
    assert len(bench.queue.replies()) == 2


def test_a_call_whose_answer_was_lost_is_sent_again_and_answers_once(bench: Bench) -> None:
    claims = bench.hold(2)
    bench.streams.faults = [redis.ConnectionError("cut")]

    bench.settle(*[Finished(claim.address, Reply(values=["a"]), digests=["d"]) for claim in claims])

    assert bench.streams.calls == [2, 2]
    assert len(bench.queue.replies()) == 2
    assert bench.window.names() == []


def test_a_late_twin_is_counted_as_such(bench: Bench) -> None:
    (claim,) = bench.hold(1)
    bench.queue.settle([claim])

    bench.settle(Finished(claim.address, Reply(values=["a"])))

    assert (bench.counters.late, bench.counters.jobs, bench.window.names()) == (1, 0, [])


def test_a_buried_answer_leaves_its_job_among_the_dead_letters(bench: Bench) -> None:
    (claim,) = bench.hold(1)

    bench.settle(Finished(claim.address, Reply(error=ModelFailed("no")), bury="max_attempts"))

    assert [letter[b"reason"] for letter in bench.queue.dead_letters()] == [b"max_attempts"]
    assert isinstance(bench.replies()[claim.address.job_id].error, ModelFailed)


def test_answers_of_suspects_are_encoded_while_no_other_lane_is_in_a_stage() -> None:
    keeper, gate, alone = Keeping(), StageGate(), list[str | None]()
    bench = Bench(keeper, partial(gate.stage, "one"))
    claims = bench.hold(2)
    bench.window.keep([], suspects=names(claims[:1]))
    keeper.on_encode = lambda: alone.append(gate._alone)

    bench.settle(Finished(claims[0].address, Reply(values=["suspect"]), digests=["d"]))
    bench = Bench(keeper, partial(gate.stage, "one"))
    bench.settle(*[Finished(claim.address, Reply(values=["other"]), digests=["d"]) for claim in bench.hold(2)])

    assert alone == ["one", None, None]
