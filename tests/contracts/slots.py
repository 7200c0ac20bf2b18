"""What `slots` promises, on any server."""

from __future__ import annotations

import time
import uuid

import pytest
from contracts.queue import Queue

from millstream.broker.contract.keys import upstream_key
from millstream.broker.contract.slots import Demand
from millstream.broker.queue import slots
from millstream.broker.queue.slots import TTL_MS, SharedSlots


class SlotsContract:
    """A subclass gives the fixture `queue`."""

    @pytest.fixture
    def url(self) -> str:
        return f"http://{uuid.uuid4().hex}:1/v1"

    def test_workers_see_each_others_requests_until_they_leave(self, queue: Queue, url: str) -> None:
        first, second = SharedSlots(queue.client, url, "a"), SharedSlots(queue.client, url, "b")
        first.exchange(Demand(2, 1), 0, "")
        seen = second.exchange(Demand(3, 0), 0, "")

        assert seen.workers == {"a": Demand(2, 1), "b": Demand(3, 0)}
        assert (seen.version, seen.state) == (0, "")
        assert 0 < queue.client.pttl(upstream_key(url)) <= TTL_MS
        first.leave()
        assert second.exchange(Demand(3, 0), 0, "").workers == {"b": Demand(3, 0)}
        queue.client.delete(upstream_key(url))

    def test_of_two_changes_to_the_same_state_one_is_written(self, queue: Queue, url: str) -> None:
        first, second = SharedSlots(queue.client, url, "a"), SharedSlots(queue.client, url, "b")
        one = first.exchange(Demand(1, 0), 0, "one")
        two = second.exchange(Demand(1, 0), 0, "two")
        three = second.exchange(Demand(1, 0), two.version, "three")

        assert [(each.version, each.state) for each in (one, two, three)] == [(1, "one"), (1, "one"), (2, "three")]
        queue.client.delete(upstream_key(url))

    def test_a_dead_workers_requests_count_for_one_lease(
        self, queue: Queue, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slots, "LEASE_MS", 50)
        SharedSlots(queue.client, url, "dead").exchange(Demand(9, 9), 0, "")
        time.sleep(0.1)

        assert list(SharedSlots(queue.client, url, "b").exchange(Demand(1, 0), 0, "").workers) == ["b"]
        queue.client.delete(upstream_key(url))

    def test_fields_of_others_end_no_worker(self, queue: Queue, url: str) -> None:
        queue.client.hset(upstream_key(url), mapping={"w:x": "junk", "version": "junk", "state": "junk", "other": "1"})

        seen = SharedSlots(queue.client, url, "a").exchange(Demand(1, 0), 0, "")

        assert (seen.version, seen.state, list(seen.workers)) == (0, "junk", ["a"])
        queue.client.delete(upstream_key(url))
