"""The token bucket against a model of ten lines, over random arrivals."""

from __future__ import annotations

from dataclasses import dataclass

import fakeredis
from contracts.queue import Queue, draft
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.queue.stream_types import Group

SLACK = 0.5
"""Rows that the test's own duration may refill, at RATE a second."""

RATE = 5.0


@dataclass
class Bucket:
    """At most `burst`, refilled at RATE."""

    burst: float
    level: float

    def passes(self, seconds: float) -> None:
        self.level = min(self.burst, self.level + seconds * RATE)

    def sure(self, cost: int) -> bool | None:
        """Whether `cost` must be admitted; None where it hangs on the moment."""
        return None if abs(cost - self.level) <= SLACK else cost < self.level


STEPS = st.lists(st.tuples(st.integers(0, 8).map(lambda n: n / 4), st.integers(1, 12)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(burst_s=st.sampled_from([1.0, 2.0]), steps=STEPS)
def test_a_bucket_admits_what_its_model_admits(burst_s: float, steps: list[tuple[float, int]]) -> None:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer(), protocol=2)
    queue = Queue(client, ServiceKeys("rate"))
    queue.open(max_queue_size=10_000)
    client.hset(queue.keys.spec(), mapping={"rate_rows": RATE, "rate_burst_s": burst_s})
    model = Bucket(RATE * burst_s, RATE * burst_s)

    for seconds, cost in steps:
        model.passes(seconds)
        if client.exists(queue.keys.bucket()):
            client.hincrbyfloat(queue.keys.bucket(), "at", -seconds)
        (admission,) = queue.streams.enqueue([Group(Priority.NORMAL, [draft(rows=cost)])])

        expected = model.sure(cost)
        assert expected is None or (admission.refused == "") == expected
        if not admission.refused:
            model.level -= cost
