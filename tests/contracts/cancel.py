"""What `cancel` promises, on any server."""

from __future__ import annotations

import pytest
from contracts.queue import CALLER, LEASE_MS, Queue, draft, ids, names

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.job import PRIORITIES, Draft, Priority
from millstream.broker.contract.keys import STREAM_INDEX


class CancelContract:
    """A subclass gives the fixture `queue`."""

    def test_a_job_that_waits_is_gone_and_its_client_which_waits_for_no_reply_gets_none(self, queue: Queue) -> None:
        for priority in PRIORITIES:
            unwanted, wanted = queue.put(draft(), draft(), priority=priority)

            assert queue.streams.cancel([unwanted.id], CALLER) == ["waiting"]

            assert ids(queue.claim().claims) == [wanted.id]
            assert not queue.client.exists(queue.keys.reply(CALLER), queue.keys.result(unwanted.id))

    def test_a_detached_jobs_cancellation_is_its_result(self, queue: Queue) -> None:
        (job,) = queue.put(draft(client=""))

        assert queue.streams.cancel([job.id], "") == ["waiting"]

        reply = queue.client.get(queue.keys.result(job.id))
        assert isinstance(reply, bytes)
        assert isinstance(decode_reply(reply).error, Cancelled)
        assert queue.client.pttl(queue.keys.result(job.id)) > 0

    def test_a_job_that_was_given_back_waits_too(self, queue: Queue) -> None:
        claims = queue.hold("dead", draft())
        queue.lease.release("dead", gone=True)

        assert queue.streams.cancel(ids(claims), CALLER) == ["waiting"]

        assert (queue.claim().claims, queue.depth()) == ([], 0)

    def test_the_worker_that_holds_a_job_is_told_once_and_no_other(self, queue: Queue) -> None:
        unwanted, wanted = claims = queue.hold("w1", draft(), draft())

        assert queue.streams.cancel(ids([unwanted]), CALLER) == ["running"]

        assert queue.lease.beat("w2", {}, []).cancelled == []
        assert queue.lease.beat("w1", {}, names(claims)).cancelled == names([unwanted])
        assert queue.lease.beat("w1", {}, names(claims)).cancelled == []
        assert queue.settle([unwanted, wanted]) == ["answered", "answered"]

    def test_what_was_settled_or_never_was_is_gone(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft())
        queue.settle(claims)

        assert queue.streams.cancel([*ids(claims), draft().id], CALLER) == ["gone", "gone"]

        assert [reply for _, reply in queue.replies()] == [b"reply"]

    @pytest.mark.parametrize("older", [False, True], ids=["", "sent by an older version"])
    def test_a_job_of_another_priority_under_the_same_entry_id_is_left_alone(self, queue: Queue, older: bool) -> None:
        wanted, unwanted = draft(), draft()
        (waiting, fields), *_ = self._put_at_once(queue, wanted, unwanted, older)

        assert queue.streams.cancel([unwanted.id], CALLER) == ["waiting"]

        assert queue.jobs(Priority.BATCH) == []
        assert queue.jobs(Priority.REALTIME) == [(waiting, fields)]
        assert ids(queue.claim().claims) == [wanted.id]

    def _put_at_once(
        self, queue: Queue, urgent: Draft, other: Draft, older: bool
    ) -> list[tuple[str, dict[bytes, bytes]]]:
        """One realtime and one batch job, both as entry 1-1: as where they come within one ms."""
        queue.put(urgent, priority=Priority.REALTIME)
        queue.put(other, priority=Priority.BATCH)
        for job, priority in ((urgent, Priority.REALTIME), (other, Priority.BATCH)):
            ((_, fields),) = queue.jobs(priority)
            stream = queue.keys.stream(priority)
            queue.client.delete(stream)
            queue.client.xadd(stream, {name.decode(): value for name, value in fields.items()}, id="1-1")
            named = "1-1" if older else f"{STREAM_INDEX[priority]}:1-1"
            queue.client.set(queue.keys.seen(job.id), named, px=60_000)
        queue.streams.create_groups()
        return queue.jobs(Priority.REALTIME)

    def test_cancelling_again_changes_nothing(self, queue: Queue) -> None:
        (job,) = queue.put(draft())

        assert queue.streams.cancel([job.id, job.id], CALLER) == ["waiting", "gone"]

    def test_a_mark_lives_two_leases_whatever_else_is_cancelled(self, queue: Queue) -> None:
        first, ahead, last = queue.hold("w1", draft(), draft(), draft())
        queue.streams.cancel(ids([first, ahead]), CALLER)
        now = queue.now()
        # Ahead: as after a step back of the clock.
        moments = {first.address.name: now - 2 * LEASE_MS - 1, ahead.address.name: now + 3 * LEASE_MS}
        queue.client.zadd(queue.keys.cancelled(), moments)

        queue.streams.cancel(ids([last]), CALLER)

        assert queue.client.zrange(queue.keys.cancelled(), 0, -1) == [last.address.name.encode()]
        assert 0 < queue.client.pttl(queue.keys.cancelled()) <= 2 * LEASE_MS

    def test_a_job_that_is_settled_takes_its_mark_with_it_and_leaves_the_others(self, queue: Queue) -> None:
        settled, marked = claims = queue.hold("w1", draft(), draft())
        queue.streams.cancel(ids(claims), CALLER)

        assert queue.settle([settled]) == ["answered"]

        assert queue.client.zrange(queue.keys.cancelled(), 0, -1) == [marked.address.name.encode()]
