"""What the scripts count, and what `broker/queue/metrics.py` reads of it, on any server."""

from __future__ import annotations

from contracts.queue import Queue, draft, names

from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.errors import WorkerLost
from millstream.broker.contract.job import Claim, Priority, Reply
from millstream.broker.queue.lease import Package
from millstream.broker.queue.stream_types import DetachedCall, Group, Settlement

DAY_S = 86_400


class MetricsContract:
    """A subclass gives the fixture `queue`."""

    def test_accepted_jobs_and_rows_are_counted_by_priority_and_once(self, queue: Queue) -> None:
        group = Group(Priority.NORMAL, [draft(rows=2), draft(rows=3)])
        call = DetachedCall("c" * 32, 2, "payload")
        detached = Group(Priority.BATCH, [draft(rows=4, client=""), draft(client="")], call=call)

        queue.streams.enqueue([group, Group(Priority.REALTIME, [draft()]), detached])
        queue.streams.enqueue([group, detached])

        assert queue.totals().jobs == {"realtime": 1, "normal": 2, "batch": 2}
        assert queue.totals().rows == {"realtime": 1, "normal": 5, "batch": 5}

    def test_refused_calls_are_counted_by_reason_and_their_jobs_not_at_all(self, queue: Queue) -> None:
        queue.client.hset(queue.keys.spec(), mapping={"max_queue_size": 1})
        queue.put(draft())
        group = Group(Priority.NORMAL, [draft()])

        queue.streams.enqueue([group, Group(Priority.BATCH, [draft(), draft()])])
        queue.streams.enqueue([group._replace(refusals=0)])
        queue.client.set(queue.keys.paused(), "refusing")
        queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])

        assert queue.totals().refused == {"paused": 1, "queue_full": 2}
        assert queue.totals().jobs == {"realtime": 0, "normal": 1, "batch": 0}

    def test_a_service_that_does_not_exist_gets_no_counters(self, queue: Queue) -> None:
        queue.client.delete(queue.keys.spec())

        queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])

        assert not queue.client.exists(queue.keys.metrics())

    def test_rows_are_counted_as_answered_and_by_error_code_when_their_job_is_settled(self, queue: Queue) -> None:
        whole, part, lost = queue.hold("w1", draft(rows=2), draft(rows=5), draft(rows=3))

        queue.streams.settle(
            [
                Settlement(whole.address, b"reply"),
                Settlement(part.address, b"reply", failed={"input_too_long": 1, "model_failed": 2}),
                Settlement(lost.address, b"reply", "max_attempts", {"worker_lost": 3}),
            ]
        )

        assert (queue.totals().settled, queue.totals().ok) == (3, 4)
        assert queue.totals().failed == {"input_too_long": 1, "model_failed": 2, "worker_lost": 3}
        assert queue.totals().buried == {"max_attempts": 1}

    def test_a_late_answer_is_not_counted(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft(rows=2))
        queue.settle(claims)

        assert queue.settle(claims, bury="max_attempts") == ["late"]

        assert (queue.totals().settled, queue.totals().ok, queue.totals().buried) == (1, 2, {})

    def test_a_reply_that_cannot_be_written_counts_as_failed_and_buried(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft(rows=2))
        queue.client.set(queue.keys.reply("caller"), "no stream", px=60_000)

        assert queue.settle(claims) == ["unwritable"]

        assert (queue.totals().ok, queue.totals().failed) == (0, {"reply_unwritable": 2})
        assert queue.totals().buried == {"reply_unwritable": 1}

    def test_reasons_of_dead_letters_have_no_details_as_labels(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft(), draft())

        for claim, at in zip(claims, "ab", strict=True):
            queue.settle([claim], bury=f"malformed: {at}")

        assert queue.totals().buried == {"malformed": 2}

    def test_jobs_that_are_cancelled_or_purged_are_settled(self, queue: Queue) -> None:
        first, _ = queue.put(draft(rows=2), draft(rows=3))

        queue.streams.cancel([first.id], "caller")
        queue.streams.cancel([first.id], "caller")
        queue.streams.purge()

        assert (queue.totals().settled, queue.totals().failed) == (2, {"cancelled": 5})

    def test_a_heartbeat_adds_each_package_once(self, queue: Queue) -> None:
        first, second = Package(1, {"work:rows": 5, "padding:2": 1}), Package(2, {"work:rows": 7})

        for package in (first, first, second, first, second):
            queue.lease.beat("w1", {}, [], package)
        queue.lease.beat("w2", {}, [], first)

        assert queue.totals().work["rows"] == 5 + 7 + 5
        assert queue.totals().histograms["padding"].count == 2

    def test_a_heartbeat_with_a_package_reports_what_is_held(self, queue: Queue) -> None:
        lost, held = queue.hold("w1", draft(), draft())
        queue.settle([lost])

        beat = queue.lease.beat("w1", {"state": "ready"}, names([lost, held]), Package(1, {"work:rows": 5}))

        assert (beat.lost, beat.unknown) == (names([lost]), [])

    def test_counters_outlive_workers_and_expire_a_month_after_the_last(self, queue: Queue) -> None:
        queue.put(draft())
        assert 29 * DAY_S < queue.client.ttl(queue.keys.metrics()) <= 30 * DAY_S

        queue.client.expire(queue.keys.metrics(), 60)
        queue.lease.beat("w1", {}, [], Package(1, {"work:rows": 5}))
        queue.lease.release("w1", gone=True)

        assert 29 * DAY_S < queue.client.ttl(queue.keys.metrics()) <= 30 * DAY_S
        assert queue.totals().work["rows"] == 5

    def test_no_job_is_lost_to_a_key_of_another_type(self, queue: Queue) -> None:
        queue.client.set(queue.keys.metrics(), "no hash", px=60_000)
        claims: list[Claim] = queue.hold("w1", draft(), draft())
        queue.lease.beat("w1", {}, names(claims), Package(1, {"work:rows": 5}))

        assert queue.settle(claims[:1]) == ["answered"]
        lost = encode_reply(Reply(error=WorkerLost("no")))
        assert queue.settle(claims[1:], lost, bury="max_attempts") == ["answered"]

        assert len(queue.dead_letters()) == 1
        assert queue.depth() == 0
