"""A claimer keeps its window filled, and less urgent work moving; it lets realtime jobs past a window that is full."""

from __future__ import annotations

import fakeredis
import pytest
from contracts.queue import Queue, draft
from support import eventually

from millstream.broker.job import PRIORITIES, Priority
from millstream.broker.keys import ServiceKeys
from millstream.broker.lease import entry_name
from millstream.worker import claimer
from millstream.worker.batcher import Budget
from millstream.worker.claimer import Claimer, Policy
from millstream.worker.intake import Intake
from millstream.worker.models.echo import EchoModel
from millstream.worker.patience import Patience
from millstream.worker.settler import Finished
from millstream.worker.shared import Shared
from millstream.worker.shares import Shares
from millstream.worker.window import HOLD_BATCHES, Window

ROWS = 4
"""Rows of a micro-batch, each a job of its own."""


class Bench:
    """A claimer on a queue of its own; the test is its runner and its settler."""

    def __init__(self, shares: dict[Priority, float]) -> None:
        client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2)
        self.queue = Queue(client, ServiceKeys("echo"))
        self.queue.open()
        self.shared = Shared("w1", Window(Budget(ROWS, tokens=1_000)))
        self.finished: list[Finished] = []
        self.claimer = Claimer(
            self.shared,
            claimer.Queue(self.queue.streams, self.queue.streams, self.queue.lease),
            Intake(EchoModel("echo"), max_attempts=3),
            Policy(Patience(0.0), dict.fromkeys(PRIORITIES, 0.0), Shares(shares, 2 * ROWS)),
            self.finished.append,
        )

    def put(self, priority: Priority, jobs: int) -> None:
        self.queue.put(*[draft() for _ in range(jobs)], priority=priority)

    def run_one(self) -> list[Priority]:
        """One micro-batch, run and settled: of which priority its jobs were."""
        window = self.shared.window
        batch = window.take()
        done = window.complete(batch, ["done"] * len(batch))
        addresses = [held.claim.address for held in done]
        self.queue.settle([held.claim for held in done])
        window.forget([entry_name(address) for address in addresses])
        return [address.priority for address in addresses]


@pytest.fixture
def bench() -> Bench:
    return Bench({Priority.REALTIME: 0.7, Priority.NORMAL: 0.2, Priority.BATCH: 0.1})


def test_a_realtime_job_passes_a_window_that_is_full_and_nothing_else_does(bench: Bench) -> None:
    bench.put(Priority.BATCH, 100)
    bench.claimer.start()
    eventually(lambda: bench.shared.window.room(1) is None)
    bench.put(Priority.REALTIME, 1)

    eventually(lambda: bench.shared.window.waiting_realtime == 1)
    in_hand = len(bench.shared.window.names())
    first = bench.run_one()
    bench.shared.life.drain()
    bench.claimer.join()

    bench.shared.life.check()
    assert first == [Priority.REALTIME]
    assert in_hand == HOLD_BATCHES * ROWS + 1


def test_no_class_starves_while_more_urgent_ones_saturate_the_worker(bench: Bench) -> None:
    served = dict.fromkeys(PRIORITIES, 0)

    for _ in range(80):
        for priority in PRIORITIES:
            bench.put(priority, max(0, 24 - len(bench.queue.jobs(priority))))
        bench.claimer._step()
        for priority in bench.run_one():
            served[priority] += 1

    total = sum(served.values())
    assert served[Priority.NORMAL] >= 0.1 * total
    assert served[Priority.BATCH] >= 0.05 * total
    assert served[Priority.REALTIME] >= 0.5 * total
