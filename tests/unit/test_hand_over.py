"""Jobs that are handed over lose no output and no attempt; a drain hands over at once if another worker is ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import redis
from contracts.emit import partial
from contracts.emitting import Bench as EmitBench
from support import eventually

from millstream.broker.contract.errors import BrokerUnavailable
from millstream.broker.contract.keys import GROUP, RETURNED
from millstream.broker.contract.partial import Record, decode_records
from millstream.worker.intake import hand_over
from millstream.worker.intake.hand_over import HandOver, Others
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.shutdown import Shutdown


class Bench(EmitBench):
    """An emitter, and the thread that hands over behind it. `ready`: another worker is."""

    def __init__(self, drain_s: float = 60.0) -> None:
        super().__init__()
        self.ready, self.looks = False, 0
        self.announced: list[float] = []
        others = Others(lambda: self.ready, self.is_ready, lambda: self.announced.append(time.monotonic()))
        self.hand_over = HandOver(self.context, self.queue.lease, self.emitter, others, drain_s)

    def is_ready(self) -> bool:
        self.looks += 1
        return self.ready

    def running(self) -> ActiveJob:
        _, job = self.hold()
        self.context.window.keep([job.name])
        return job

    def pending(self, consumer: str) -> list[tuple[bytes, int]]:
        """The entries of `consumer` and their delivery counts."""
        found: list[tuple[bytes, int]] = []
        for stream in self.queue.keys.streams():
            for each in self.queue.client.xpending_range(stream, GROUP, "-", "+", 10, consumer):
                found.append((cast(bytes, each["message_id"]), cast(int, each["times_delivered"])))
        return found

    @contextmanager
    def works(self) -> Iterator[None]:
        threads = [self.emitter, self.hand_over]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.hand_over.finish()
            self.hand_over.join()
            self.emitter.stop()
            self.emitter.join()
        self.context.shutdown.check()


def test_all_output_is_on_the_server_before_a_job_is_given_back() -> None:
    bench = Bench()
    job = bench.running()
    bench.streams.before = [redis.exceptions.ConnectionError("cut")]
    bench.emitter.put(job, Record("a "))
    with bench.works():
        bench.emitter.put(job, Record("b "))
        bench.hand_over.put([job])

        eventually(lambda: bench.pending(RETURNED))

    assert [record.text for record in decode_records(partial(bench.queue, job.claim))] == ["a ", "b "]
    # No attempt: output forgives earlier ones.
    assert bench.pending(RETURNED)[0][1] <= 1
    assert bench.pending("w1") == []
    assert bench.context.window.names() == []
    assert bench.queue.client.xlen(bench.queue.keys.bell()) == 1


def test_a_job_without_output_is_given_back_without_an_attempt() -> None:
    bench = Bench()
    job = bench.running()
    with bench.works():
        bench.hand_over.put([job])
        eventually(lambda: bench.pending(RETURNED))

    assert [deliveries for _, deliveries in bench.pending(RETURNED)] == [1]


def test_a_job_that_came_back_meanwhile_is_not_given_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    job = bench.running()
    lease, release = bench.queue.lease, bench.queue.lease.release
    calls: list[object] = []

    def answer_is_lost(*words: Any, **options: Any) -> int:
        calls.append(options)
        release(*words, **options)
        if len(calls) == 1:
            # The job is claimed again by this worker before the call is repeated.
            claims = bench.queue.claim("w1").claims
            bench.context.window.keep([claim.address.name for claim in claims])
            raise BrokerUnavailable("cut")
        return 0

    monkeypatch.setattr(lease, "release", answer_is_lost)
    with bench.works():
        bench.hand_over.put([job])
        bench.hand_over.finish()
        bench.hand_over.join()

    assert bench.context.window.names() == [job.name]
    assert len(bench.pending("w1")) == 1
    assert bench.pending(RETURNED) == []


def test_output_that_cannot_be_emitted_delays_a_hand_over_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over, "FLUSH_S", 0.1)
    bench = Bench()
    job = bench.running()
    bench.streams.before = [redis.exceptions.ConnectionError("cut")] * 100
    bench.emitter.put(job, Record("a "))
    with bench.works():
        bench.hand_over.put([job])
        eventually(lambda: bench.pending(RETURNED))

    assert partial(bench.queue, job.claim) == b""


@pytest.mark.parametrize(("ready", "drain_s"), [(True, 60.0), (False, 0.4)])
def test_a_drain_is_due_if_another_worker_is_ready_or_its_time_is_nearly_over(ready: bool, drain_s: float) -> None:
    bench = Bench(drain_s)
    bench.ready = ready
    with bench.works():
        began = time.monotonic()
        bench.hand_over.note_drain()
        eventually(lambda: bench.hand_over.is_due)
        seconds = time.monotonic() - began

    # This worker says that it drains before it looks for others.
    assert len(bench.announced) == 1
    assert hand_over.LOOK_S <= seconds < 5.0


def test_a_drain_without_another_worker_is_not_due() -> None:
    bench = Bench()
    with bench.works():
        bench.hand_over.note_drain()
        eventually(lambda: bench.looks > 2)

    assert not bench.hand_over.is_due


def test_a_worker_that_drains_or_is_gone_is_not_ready() -> None:
    bench = Bench()
    lease = bench.queue.lease

    def others() -> bool:
        return lease.has_ready_worker("w1")

    lease.beat("w1", {"state": "ready"}, [])
    alone = others()
    lease.beat("w2", {"state": "ready"}, [])
    ready = others()
    lease.beat("w2", {"state": "draining"}, [])
    draining = others()
    lease.beat("w2", {"state": "ready"}, [])
    bench.queue.client.zadd(bench.queue.keys.workers(), {"w2": lease.now() - 60_000})

    assert (alone, ready, draining, others()) == (False, True, False, False)


def test_a_lane_that_is_evicted_hands_nothing_over() -> None:
    bench = Bench()
    bench.ready = True
    process = bench.context.shutdown._process = Shutdown()
    bench.context.shutdown.drain()
    assert bench.context.shutdown.evicting
    with bench.works():
        bench.hand_over.note_drain()
        assert bench.hand_over._queue.empty()
        assert not bench.hand_over.is_due

        process.drain()
        bench.hand_over.note_drain()
        eventually(lambda: bench.hand_over.is_due)
