"""What a pause and a purge promise, on any server."""

from __future__ import annotations

import time

import pytest
import redis
from contracts.queue import CALLER, Queue, draft, ids, names

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.contract.keys import GROUP, RETURNED
from millstream.broker.queue.pause import Pause, find_pause, pause, resume
from millstream.broker.queue.stream_types import Admission, Group

PAUSED = Admission("paused", 0.5)


class PauseContract:
    """A subclass gives the fixture `queue`."""

    def test_a_paused_service_gives_nothing_to_anybody_until_it_is_resumed(self, queue: Queue) -> None:
        lost = queue.hold("dead", draft())
        queue.lease.release("dead", gone=True)
        put = [queue.put(draft(), priority=priority)[0] for priority in PRIORITIES]
        pause(queue.client, queue.keys)

        claimed = queue.claim()

        assert (claimed.paused, claimed.claims, claimed.waiting, claimed.suspects) == (True, [], (1, 2, 1), 0)
        assert queue.held_by("w1") == []
        assert resume(queue.client, queue.keys)
        claimed = queue.claim()
        realtime, *others = [each.id for each in put]
        assert (claimed.paused, ids(claimed.claims)) == (False, [realtime, *ids(lost), *others])

    def test_what_is_held_when_the_pause_begins_can_be_settled(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft())
        pause(queue.client, queue.keys)

        assert queue.lease.beat("w1", {}, names(claims)).lost == []
        assert queue.settle(claims) == ["answered"]

    def test_a_job_that_was_delivered_meanwhile_is_handed_back_without_an_attempt(self, queue: Queue) -> None:
        (job,) = queue.put(draft())
        pause(queue.client, queue.keys)
        woken = queue.wait("w1", 5.0, jobs=8)

        assert woken.paused
        assert queue.lease.release("w1", only=names(woken.claims)) == 1

        resume(queue.client, queue.keys)
        (claim,) = queue.claim("w2").claims
        assert (claim.address.job_id, claim.attempts) == (job.id, 0.0)

    def test_a_lost_stream_is_reported_in_a_pause_too(self, queue: Queue) -> None:
        pause(queue.client, queue.keys)
        queue.client.delete(queue.keys.stream(Priority.NORMAL))

        with pytest.raises(redis.ResponseError, match=r"^NOGROUP"):
            queue.claim()

    def test_a_paused_service_takes_new_jobs(self, queue: Queue) -> None:
        pause(queue.client, queue.keys)

        queue.put(draft())

        assert queue.depth() == 1

    def test_a_pause_that_refuses_turns_new_jobs_away_and_knows_the_old_ones(self, queue: Queue) -> None:
        (before,) = queue.put(draft())
        pause(queue.client, queue.keys, refusing=True)
        new = Group(Priority.NORMAL, [draft()])

        assert queue.streams.enqueue([Group(Priority.NORMAL, [before]), new]) == [Admission(), PAUSED]

        assert queue.depth() == 1
        resume(queue.client, queue.keys)
        assert queue.streams.enqueue([new]) == [Admission()]

    def test_a_pause_lasts_until_it_is_resumed_or_as_long_as_it_was_given(self, queue: Queue) -> None:
        assert find_pause(queue.client, queue.keys) is None

        pause(queue.client, queue.keys, for_s=60.0)
        found = find_pause(queue.client, queue.keys)
        assert found is not None
        assert found.left_ms is not None
        assert 0 < found.left_ms <= 60_000

        pause(queue.client, queue.keys, refusing=True)
        assert find_pause(queue.client, queue.keys) == Pause(refusing=True, left_ms=None)

        assert resume(queue.client, queue.keys)
        assert not resume(queue.client, queue.keys)
        assert find_pause(queue.client, queue.keys) is None


class PurgeContract:
    """A subclass gives the fixture `queue`."""

    def test_whatever_waits_is_gone_and_its_caller_is_told(self, queue: Queue) -> None:
        put = [each for priority in PRIORITIES for each in queue.put(draft(), draft(), priority=priority)]

        assert queue.streams.purge() == 6

        assert (queue.claim().claims, queue.depth()) == ([], 0)
        assert sorted(job_id for job_id, _ in queue.replies()) == sorted(each.id for each in put)
        assert all(isinstance(decode_reply(reply).error, Cancelled) for _, reply in queue.replies())
        assert queue.client.pttl(queue.keys.reply(CALLER)) > 0

    def test_a_caller_whose_deadline_has_passed_waits_no_more_and_gets_no_reply(self, queue: Queue) -> None:
        _, waits = queue.put(draft(deadline=time.monotonic()), draft(deadline=time.monotonic() + 60))

        assert queue.streams.purge() == 2

        assert [job_id for job_id, _ in queue.replies()] == [waits.id]

    def test_more_than_one_page_is_purged(self, queue: Queue) -> None:
        queue.put(*[draft() for _ in range(300)])

        assert queue.streams.purge() == 300

        assert (queue.depth(), len(queue.replies())) == (0, 300)

    def test_what_a_worker_holds_goes_on(self, queue: Queue) -> None:
        held = queue.hold("w1", draft())
        queue.put(draft())

        assert queue.streams.purge() == 1

        assert queue.lease.beat("w1", {}, names(held)).cancelled == []
        assert queue.settle(held) == ["answered"]
        assert len(queue.replies()) == 2

    def test_what_was_given_back_waits_too(self, queue: Queue) -> None:
        queue.hold("dead", draft())
        queue.lease.release("dead", gone=True)

        assert queue.streams.purge() == 1

        assert (queue.held_by(RETURNED), queue.claim().claims) == ([], [])
        assert queue.client.xpending(queue.keys.stream(Priority.NORMAL), GROUP)["pending"] == 0

    def test_a_detached_jobs_result_says_so_for_its_lifetime(self, queue: Queue) -> None:
        (job,) = queue.put(draft(client=""))

        queue.streams.purge()

        reply = queue.client.get(queue.keys.result(job.id))
        assert isinstance(reply, bytes)
        assert isinstance(decode_reply(reply).error, Cancelled)
        assert 0 < queue.client.pttl(queue.keys.result(job.id)) <= 60_000
        assert 0 < queue.client.pttl(queue.keys.seen(job.id)) <= 60_000

    def test_an_entry_that_nobody_could_read_is_gone_as_well(self, queue: Queue) -> None:
        queue.put_raw({b"hello": b"world"})

        assert queue.streams.purge() == 1

        assert (queue.depth(), queue.replies()) == (0, [])

    def test_a_reply_that_cannot_be_written_keeps_nothing_on_the_queue(self, queue: Queue) -> None:
        queue.put(draft(client="broken"), draft())
        queue.client.set(queue.keys.reply("broken"), "not a stream", px=60_000)

        assert queue.streams.purge() == 2

        assert (queue.depth(), len(queue.replies())) == (0, 1)

    def test_an_empty_queue_and_one_without_streams_have_nothing_to_purge(self, queue: Queue) -> None:
        assert queue.streams.purge() == 0
        queue.client.delete(*queue.keys.streams())
        assert queue.streams.purge() == 0
