"""An emitter on a queue of its own, whose server fails as it is told."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import fakeredis
from contracts.emit import streaming
from contracts.queue import Queue

from millstream.broker.contract.job import Claim, Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Emission
from millstream.broker.queue.streams import Streams
from millstream.worker.context import Context
from millstream.worker.intake.emitter import Emitter
from millstream.worker.models.base import Prepared
from millstream.worker.scheduling.active_job import ActiveJob
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.window import Window


class Flaky(Streams):
    """Fails as it is told: before it asks the server, or after, so that the answer is lost."""

    before: Sequence[Exception] = ()
    after: Sequence[Exception] = ()
    calls = 0

    def emit(self, consumer: str, emissions: Sequence[Emission]) -> list[int]:
        self.calls += 1
        if self.before:
            error, *self.before = self.before
            raise error
        lengths = super().emit(consumer, emissions)
        if self.after:
            error, *self.after = self.after
            raise error
        return lengths


class Bench:
    def __init__(self) -> None:
        client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2)
        self.queue = Queue(client, ServiceKeys(f"test-{uuid.uuid4().hex[:12]}"))
        self.queue.open()
        self.streams = Flaky(client, self.queue.keys)
        self.lost: list[str] = []
        self.context = Context("w1", Window(Budget(8, 1_000)))
        self.emitter = Emitter(self.context, self.streams, self.lost.extend)

    def hold(self, consumer: str = "w1", priority: Priority = Priority.NORMAL) -> tuple[Claim, ActiveJob]:
        self.queue.put(streaming(), priority=priority)
        self.queue.lease.beat(consumer, {}, [])
        (claim,) = self.queue.claim(consumer).claims
        return claim, active(claim)


def active(claim: Claim, records: bytes = b"") -> ActiveJob:
    assert claim.job
    job = ActiveJob(claim, claim.job, [Prepared(3, "")])
    job.records = records
    return job
