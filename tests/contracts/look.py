"""What `look` promises, on any server: it tells what no worker holds, and changes nothing."""

from __future__ import annotations

from typing import cast

from contracts.queue import Queue, draft

from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.look import Waiting, look


class LookContract:
    """A subclass gives the fixture `queue`."""

    def test_it_tells_how_many_jobs_wait_and_when_the_oldest_came_and_is_due(self, queue: Queue) -> None:
        queue.put(draft(deadline=60_000.0), draft(), priority=Priority.REALTIME)
        (oldest, _) = [fields for _, fields in queue.jobs(Priority.REALTIME)]

        found = look(queue.client, queue.keys)

        assert found.streams == {
            Priority.REALTIME: Waiting(2, int(oldest[b"at"]), int(oldest[b"deadline"])),
            Priority.NORMAL: Waiting(0, 0, 0),
            Priority.BATCH: Waiting(0, 0, 0),
        }
        assert not found.paused

    def test_jobs_that_a_worker_holds_do_not_wait_and_returned_ones_do(self, queue: Queue) -> None:
        held = queue.hold("w1", draft(deadline=90_000.0), draft(deadline=80_000.0))
        queue.put(draft(deadline=70_000.0))
        entries = dict(queue.jobs())
        deadlines = [int(fields[b"deadline"]) for fields in entries.values()]

        assert look(queue.client, queue.keys).streams[Priority.NORMAL][::2] == (1, deadlines[2])
        queue.lease.release("w1", only=[held[1].address.name])
        assert look(queue.client, queue.keys).streams[Priority.NORMAL][::2] == (2, deadlines[1])
        queue.settle(queue.claim("w2").claims)
        assert look(queue.client, queue.keys).streams[Priority.NORMAL] == (0, 0, 0)

    def test_a_service_without_streams_or_groups_has_nothing_or_all_waiting(self, queue: Queue) -> None:
        queue.put(draft())
        (entry,) = queue.jobs()
        for stream in queue.keys.streams():
            queue.client.xgroup_destroy(stream, "workers")
        assert look(queue.client, queue.keys).streams[Priority.NORMAL].jobs == 1

        queue.client.delete(*queue.keys.streams())

        assert {each.jobs for each in look(queue.client, queue.keys).streams.values()} == {0}
        assert queue.client.exists(*queue.keys.streams()) == 0
        assert entry

    def test_an_entry_that_nobody_can_read_counts_and_has_no_times(self, queue: Queue) -> None:
        queue.put_raw({b"at": b"soon", b"deadline": b"1" * 17})

        assert look(queue.client, queue.keys).streams[Priority.NORMAL] == (1, 0, 0)

    def test_it_says_whether_the_service_is_paused(self, queue: Queue) -> None:
        queue.client.set(queue.keys.paused(), "1")

        assert look(queue.client, queue.keys).paused

    def test_it_changes_nothing(self, queue: Queue) -> None:
        queue.hold("w1", draft())
        queue.put(draft())
        keys = cast(list[bytes], queue.client.keys("*"))
        before = {key: queue.client.dump(key) for key in keys}

        look(queue.client, queue.keys)

        assert {key: queue.client.dump(key) for key in cast(list[bytes], queue.client.keys("*"))} == before
        assert set(look(queue.client, queue.keys).streams) == set(PRIORITIES)
