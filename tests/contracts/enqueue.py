"""What `enqueue` promises, on any server."""

from __future__ import annotations

import time

from contracts.queue import Queue, draft

from millstream.broker.contract.entry_codec import FIELDS, decode_entry
from millstream.broker.contract.job import PRIORITIES, Priority
from millstream.broker.queue.stream_types import Admission, DetachedCall, Group

ACCEPTED = Admission()


def full(limit: int) -> Admission:
    return Admission("queue_full", 0.1, limit)


class EnqueueContract:
    """A subclass gives the fixture `queue`."""

    def test_a_job_waits_in_the_stream_of_its_priority(self, queue: Queue) -> None:
        for priority in PRIORITIES:
            queue.put(draft(), draft(), priority=priority)

        assert [queue.client.xlen(stream) for stream in queue.keys.streams()] == [2, 2, 2]

    def test_an_entry_holds_the_fields_in_the_order_that_is_published(self, queue: Queue) -> None:
        now = time.monotonic()
        whole = draft(rows=2, tokens=7, client="me", tenant="t", deadline=now + 9, queue_by=now + 9, trace="x")
        queue.streams.enqueue([Group(Priority.NORMAL, [whole], call=DetachedCall("c" * 32, 1, "payload"))])

        ((_, fields),) = queue.jobs()
        assert [name.decode() for name in fields] == list(FIELDS)
        assert (fields[b"tenant"], fields[b"trace"], fields[b"call"]) == (b"t", b"x", b"c" * 32)

    def test_an_entry_has_no_fields_that_say_nothing(self, queue: Queue) -> None:
        (job,) = queue.put(draft(rows=2, tokens=7, client="me"))

        ((_, fields),) = queue.jobs()
        assert [name.decode() for name in fields] == ["v", "id", "at", "op", "rows", "tokens", "client", "body"]
        read = decode_entry([part for pair in fields.items() for part in pair])
        assert (read.id, read.op, read.rows, read.tokens, read.client) == (job.id, "echo", 2, 7, "me")
        assert (read.deadline, read.queue_by, read.body) == (0, 0, job.body)

    def test_what_remains_of_a_deadline_is_counted_on_the_servers_clock(self, queue: Queue) -> None:
        before = queue.now()
        now = time.monotonic()
        queue.put(draft(deadline=now + 1000, queue_by=now + 500))

        job = queue.claim().claims[0].job
        assert job is not None
        assert before <= job.at <= queue.now()
        assert 990_000 < job.deadline - job.at <= 1_000_000
        assert 490_000 < job.queue_by - job.at <= 500_000

    def test_a_deadline_that_has_passed_is_no_absence_of_one(self, queue: Queue) -> None:
        queue.put(draft(deadline=time.monotonic() - 5))

        job = queue.claim().claims[0].job
        assert job is not None
        assert job.deadline == job.at

    def test_a_limit_beyond_any_life_is_accepted_once(self, queue: Queue) -> None:
        queue.put(draft(deadline=float("inf")), draft(deadline=1e17))

        claims = queue.claim().claims
        assert [claim.malformed for claim in claims] == ["", ""]

    def test_sending_the_same_jobs_again_changes_nothing(self, queue: Queue) -> None:
        group = Group(Priority.NORMAL, [draft(), draft()])

        assert queue.streams.enqueue([group]) == [ACCEPTED]
        assert queue.streams.enqueue([group]) == [ACCEPTED]

        assert queue.depth() == 2

    def test_a_job_that_was_settled_meanwhile_is_not_run_again_by_sending_it_again(self, queue: Queue) -> None:
        (job,) = queue.put(draft())
        queue.settle(queue.claim().claims)

        assert queue.streams.enqueue([Group(Priority.NORMAL, [job])]) == [ACCEPTED]

        assert queue.depth() == 0

    def test_a_group_that_is_sent_again_runs_nothing_again_once_its_first_job_is_forgotten(self, queue: Queue) -> None:
        group = Group(Priority.NORMAL, [draft(), draft(), draft()])
        queue.streams.enqueue([group])
        first, *others = queue.claim().claims
        queue.settle([first])
        queue.client.delete(queue.keys.seen(first.address.job_id))

        assert queue.streams.enqueue([group]) == [ACCEPTED]

        assert queue.depth() == 2
        assert queue.settle(others) == ["answered"] * 2

    def test_a_job_accepted_before_is_accepted_again_by_a_full_queue(self, queue: Queue) -> None:
        queue.open(max_queue_size=1)
        (job,) = queue.put(draft())

        assert queue.streams.enqueue([Group(Priority.NORMAL, [job])]) == [ACCEPTED]

    def test_a_group_enters_whole_or_not_at_all(self, queue: Queue) -> None:
        queue.open(max_queue_size=3)
        groups = [Group(Priority.NORMAL, [draft() for _ in range(size)]) for size in (2, 2, 1)]

        assert queue.streams.enqueue(groups) == [ACCEPTED, full(3), ACCEPTED]

        assert queue.depth() == 3

    def test_a_refused_job_may_be_sent_again_when_there_is_room(self, queue: Queue) -> None:
        queue.open(max_queue_size=1)
        queue.put(draft())
        refused = Group(Priority.NORMAL, [draft()])
        assert queue.streams.enqueue([refused]) == [full(1)]

        claims = queue.claim().claims
        assert queue.streams.enqueue([refused]) == [full(1)], "a claimed job is still in the queue"
        queue.settle(claims)

        assert queue.streams.enqueue([refused]) == [ACCEPTED]

    def test_a_service_nobody_registered_takes_no_jobs(self, queue: Queue) -> None:
        queue.client.delete(queue.keys.spec())

        assert queue.streams.enqueue([Group(Priority.NORMAL, [draft()])]) == [Admission("unknown_service")]

        assert queue.depth() == 0

    def test_what_makes_a_job_known_does_not_stay_for_ever(self, queue: Queue) -> None:
        endless, urgent = queue.put(draft(), draft(deadline=time.monotonic() + 10))

        assert 365 * 86_400_000 < queue.client.pttl(queue.keys.seen(endless.id)) <= 366 * 86_400_000
        assert 10_000 < queue.client.pttl(queue.keys.seen(urgent.id)) <= 70_000

    def test_a_full_priority_refuses_only_its_own_jobs(self, queue: Queue) -> None:
        queue.open(max_queue_size=2)
        for full_one in PRIORITIES:
            queue.put(draft(), draft(), priority=full_one)
            others = [each for each in PRIORITIES if each != full_one]
            groups = [Group(each, [draft()]) for each in (full_one, *others)]

            assert queue.streams.enqueue(groups) == [full(2), ACCEPTED, ACCEPTED]

            queue.settle(queue.claim().claims)

    def test_groups_of_one_call_count_for_the_groups_behind_them(self, queue: Queue) -> None:
        queue.open(max_queue_size=3)
        sizes = [
            (Priority.BATCH, 2),
            (Priority.NORMAL, 3),
            (Priority.BATCH, 2),
            (Priority.BATCH, 1),
            (Priority.NORMAL, 1),
        ]

        admissions = queue.streams.enqueue(
            [Group(priority, [draft() for _ in range(jobs)]) for priority, jobs in sizes]
        )

        assert admissions == [ACCEPTED, ACCEPTED, full(3), ACCEPTED, full(3)]

    def test_a_priority_without_a_limit_has_that_of_its_service(self, queue: Queue) -> None:
        """As in a record that an older version wrote."""
        limits = {"max_queue_size": "1", "max_queue_realtime": "", "max_queue_normal": "2", "max_queue_batch": ""}
        for name, limit in limits.items():
            queue.client.hset(queue.keys.spec(), name, limit)

        admissions = queue.streams.enqueue([Group(each, [draft()]) for each in PRIORITIES for _ in range(3)])

        assert admissions == [ACCEPTED, full(1), full(1), ACCEPTED, ACCEPTED, full(2), ACCEPTED, full(1), full(1)]

    def test_a_priority_can_have_a_limit_of_its_own(self, queue: Queue) -> None:
        queue.client.hset(queue.keys.spec(), "max_queue_batch", 1)
        groups = [Group(priority, [draft()]) for priority in (Priority.BATCH, Priority.BATCH, Priority.NORMAL)]

        assert queue.streams.enqueue(groups) == [ACCEPTED, full(1), ACCEPTED]

    def test_a_job_behind_a_refused_one_of_its_priority_does_not_pass_it(self, queue: Queue) -> None:
        queue.client.hset(queue.keys.spec(), mapping={"max_queue_normal": 1})
        queue.put(draft())
        first, second = draft(), draft()
        before = queue.streams.enqueue([Group(Priority.NORMAL, [first]), Group(Priority.NORMAL, [second])])
        queue.client.hdel(queue.keys.spec(), "max_queue_normal")

        assert before == [full(1), full(1)]
        assert queue.streams.enqueue([Group(Priority.NORMAL, [second]), Group(Priority.NORMAL, [first])])

    def test_a_call_that_is_sent_again_is_not_counted_again(self, queue: Queue) -> None:
        queue.client.hset(queue.keys.spec(), mapping={"max_queue_size": 0})
        group = Group(Priority.NORMAL, [draft()])

        queue.streams.enqueue([group])
        queue.streams.enqueue([group._replace(refusals=0)])

        assert queue.client.hgetall(queue.keys.refused()) == {b"queue_full": b"1"}

    def test_refusals_are_counted_by_their_reason(self, queue: Queue) -> None:
        queue.client.hset(queue.keys.spec(), mapping={"max_queue_size": 1})
        queue.put(draft())

        for _ in range(2):
            queue.streams.enqueue([Group(Priority.NORMAL, [draft()]), Group(Priority.BATCH, [draft(), draft()])])
        queue.client.set(queue.keys.paused(), "refusing")
        queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])

        assert queue.client.hgetall(queue.keys.refused()) == {b"queue_full": b"4", b"paused": b"1"}
        assert 0 < queue.client.ttl(queue.keys.refused()) <= 86_400

    def test_a_service_nobody_registered_gets_no_keys_by_being_asked_for(self, queue: Queue) -> None:
        queue.client.delete(queue.keys.spec())

        queue.streams.enqueue([Group(Priority.NORMAL, [draft()])])

        assert not queue.client.exists(queue.keys.refused())
