"""What `claim` and `wait` promise, on any server."""

from __future__ import annotations

import pytest
import redis
from contracts.queue import CALLER, Queue, draft, ids, names

from millstream.broker.contract.entry_codec import encode_entry
from millstream.broker.contract.job import PRIORITIES, Draft, Job, Priority
from millstream.broker.contract.keys import GROUP, RETURNED
from millstream.broker.queue.claims import ClaimBudget, Claimed


def entry(**changed: bytes) -> dict[bytes, bytes]:
    """A well-formed entry but for what is changed."""
    job = Job("0" * 32, 1, "echo", 1, 1, 0, 0, "", "", "", b'{"inputs":["x"]}')
    flat = [part if isinstance(part, bytes) else str(part).encode() for part in encode_entry(job)]
    return dict(zip(flat[0::2], flat[1::2], strict=True)) | {name.encode(): value for name, value in changed.items()}


MALFORMED = {
    "no number": entry(rows=b"many", tokens=b"few"),
    "not a number": entry(rows=b"nan", tokens=b"nan"),
    "infinite": entry(rows=b"inf", tokens=b"-inf"),
    "negative": entry(rows=b"-5", tokens=b"-5"),
    "huge": entry(rows=b"9" * 400, tokens=b"9" * 400),
    "other fields": {b"hello": b"world"},
    "many fields": {f"field-{i}".encode(): b"x" for i in range(2000)},
    "bytes": entry(id=b"\xff\xfe\x00"),
}


class ClaimContract:
    """A subclass gives the fixture `queue`."""

    def test_the_most_urgent_stream_comes_first_and_each_in_order(self, queue: Queue) -> None:
        put = {priority: queue.put(draft(), draft(), priority=priority) for priority in reversed(PRIORITIES)}

        claimed = queue.claim()

        assert ids(claimed.claims) == [job.id for priority in PRIORITIES for job in put[priority]]
        assert [claim.address.priority for claim in claimed.claims] == [p for p in PRIORITIES for _ in "12"]
        assert sum(claimed.waiting) == 0

    def test_what_a_lower_stream_has_saved_comes_before_its_betters(self, queue: Queue) -> None:
        for priority in PRIORITIES:
            queue.put(*[draft() for _ in range(5)], priority=priority)

        claims = queue.streams.claim("w1", ClaimBudget(jobs=4, rows=4, tokens=1_000, saved=(2, 1))).claims

        taken = [(claim.address.priority, claim.by_share) for claim in claims]
        assert taken == [
            (Priority.BATCH, True),
            (Priority.NORMAL, True),
            (Priority.NORMAL, True),
            (Priority.REALTIME, False),
        ]
        rest = [claim.job.id for claim in queue.claim("w2").claims if claim.job]
        assert len(rest) == 11
        assert not set(rest) & {claim.job.id for claim in claims if claim.job}

    def test_savings_too_small_for_the_next_job_are_kept(self, queue: Queue) -> None:
        queue.put(draft(rows=3), priority=Priority.BATCH)
        queue.put(draft(), draft())

        claims = queue.streams.claim("w1", ClaimBudget(jobs=2, rows=8, tokens=1_000, saved=(0, 2))).claims

        assert [claim.address.priority for claim in claims] == [Priority.NORMAL, Priority.NORMAL]

    def test_a_full_worker_takes_realtime_jobs_only(self, queue: Queue) -> None:
        queue.put(draft(), priority=Priority.NORMAL)
        queue.put(draft(), priority=Priority.REALTIME)

        claims = queue.streams.claim("w1", ClaimBudget(jobs=8, rows=8, tokens=1_000, streams=1)).claims

        assert [claim.address.priority for claim in claims] == [Priority.REALTIME]

    def test_what_was_given_back_may_come_from_streams_of_which_no_new_job_is_taken(self, queue: Queue) -> None:
        queue.put(draft(), priority=Priority.BATCH)
        lost = queue.claim("dead").claims
        queue.lease.release("dead", gone=True)
        queue.put(draft())

        assert queue.streams.claim("w1", ClaimBudget(8, 8, 1_000, streams=1, returned=1)).claims == []
        assert ids(queue.streams.claim("w1", ClaimBudget(8, 8, 1_000, streams=1)).claims) == ids(lost)

    def test_nothing_is_given_twice(self, queue: Queue) -> None:
        queue.put(*[draft() for _ in range(5)])

        first, second, third = queue.claim("w1", jobs=3), queue.claim("w2"), queue.claim("w3")

        assert (len(first.claims), len(second.claims), len(third.claims)) == (3, 2, 0)
        assert set(ids(first.claims)).isdisjoint(ids(second.claims))

    @pytest.mark.parametrize("limit", [ClaimBudget(2, 100, 1000), ClaimBudget(100, 6, 1000), ClaimBudget(100, 100, 20)])
    def test_a_claim_keeps_to_jobs_rows_and_tokens(self, queue: Queue, limit: ClaimBudget) -> None:
        put = queue.put(*[draft(rows=3, tokens=10) for _ in range(5)])

        claimed = queue.streams.claim("w1", limit)

        assert ids(claimed.claims) == [job.id for job in put[:2]]
        assert sum(claimed.waiting) == 3

    @pytest.mark.parametrize(
        ("limit", "taken", "blocked"),
        [
            (ClaimBudget(100, 100, 1000), 5, 0),
            (ClaimBudget(2, 100, 1000), 2, 0),
            (ClaimBudget(100, 6, 1000), 2, 0),
            (ClaimBudget(100, 8, 1000), 2, 2),
            (ClaimBudget(100, 100, 29), 2, 2),
            (ClaimBudget(100, 2, 1000), 0, 2),
        ],
    )
    def test_a_claim_says_whether_the_next_job_had_no_room(
        self, queue: Queue, limit: ClaimBudget, taken: int, blocked: int
    ) -> None:
        queue.put(*[draft(rows=3, tokens=10) for _ in range(5)])

        claimed = queue.streams.claim("w1", limit)

        assert (len(claimed.claims), claimed.blocked) == (taken, blocked)

    def test_a_claim_takes_more_than_it_looks_at_in_one_go(self, queue: Queue) -> None:
        put = queue.put(*[draft() for _ in range(30)])

        assert ids(queue.streams.claim("w1", ClaimBudget(27, 100, 100_000)).claims) == [job.id for job in put[:27]]
        assert ids(queue.streams.claim("w1", ClaimBudget(27, 100, 100_000)).claims) == [job.id for job in put[27:]]

    def test_what_does_not_fit_is_not_overtaken(self, queue: Queue) -> None:
        small, large, after = queue.put(draft(rows=2), draft(rows=4), draft(rows=2))

        assert ids(queue.claim(rows=5).claims) == [small.id]
        assert ids(queue.claim(rows=5).claims) == [large.id]
        assert ids(queue.claim(rows=5).claims) == [after.id]

    def test_what_does_not_fit_is_not_overtaken_by_a_lower_stream_either(self, queue: Queue) -> None:
        (large,) = queue.put(draft(rows=4), priority=Priority.REALTIME)
        queue.put(draft(rows=1))

        assert queue.claim(rows=2, empty_handed=False).claims == []
        assert ids(queue.claim(rows=4).claims) == [large.id]

    @pytest.mark.parametrize("large", [draft(rows=50), draft(tokens=500)])
    def test_an_over_large_job_goes_alone_to_a_worker_that_holds_nothing(self, queue: Queue, large: Draft) -> None:
        queue.put(large, draft())

        assert queue.claim(rows=10, tokens=100, empty_handed=False).claims == []
        assert ids(queue.claim(rows=10, tokens=100).claims) == [large.id]

    @pytest.mark.parametrize(("large", "too_little"), [(draft(rows=50), 7), (draft(tokens=500), 0)])
    def test_a_large_job_comes_before_more_urgent_ones_once_its_class_saved_a_micro_batch(
        self, queue: Queue, large: Draft, too_little: int
    ) -> None:
        queue.put(large, draft())
        queue.put(*[draft() for _ in range(20)], priority=Priority.REALTIME)

        def claim(saved: int, empty_handed: bool = True) -> Claimed:
            limit = ClaimBudget(4, 10, 100, empty_handed=empty_handed, saved=(saved, 0), next_rows=8, large=(20, 400))
            return queue.streams.claim("w1", limit)

        early, busy, due = claim(too_little), claim(8, empty_handed=False), claim(8)

        assert {each.address.priority for each in early.claims} == {Priority.REALTIME}
        assert {each.address.priority for each in busy.claims} <= {Priority.REALTIME}
        assert busy.suspects == 2
        assert (ids(due.claims), due.suspects) == ([large.id], 0)

    def test_a_worker_takes_its_share_and_leaves_the_rest_to_its_neighbours(self, queue: Queue) -> None:
        queue.put(*[draft() for _ in range(4)], priority=Priority.REALTIME)
        queue.put(*[draft() for _ in range(6)])

        assert [len(queue.claim(f"w{n}", live_workers=3).claims) for n in range(4)] == [4, 2, 2, 1]

    def test_what_a_worker_holds_is_a_part_of_its_share(self, queue: Queue) -> None:
        queue.put(*[draft(rows=2) for _ in range(8)])

        def claimed(held: int, next_rows: int) -> int:
            limit = ClaimBudget(100, 100, 1_000, live_workers=2, held=held, next_rows=next_rows)
            return len(queue.streams.claim("w1", limit).claims)

        assert claimed(held=6, next_rows=0) == 1
        # Its next micro-batch it may fill all the same.
        assert claimed(held=7, next_rows=3) == 2
        assert claimed(held=7, next_rows=0) == 0
        assert claimed(held=0, next_rows=0) == 3

    def test_a_lone_worker_takes_all_that_waits_whatever_it_holds(self, queue: Queue) -> None:
        queue.put(*[draft() for _ in range(8)])

        assert len(queue.streams.claim("w1", ClaimBudget(100, 100, 1_000, held=50)).claims) == 8

    def test_jobs_that_were_given_back_come_first_in_their_stream(self, queue: Queue) -> None:
        lost = queue.hold("dead", draft(), draft())
        queue.lease.release("dead", gone=True)
        (urgent,) = queue.put(draft(), priority=Priority.REALTIME)
        (after,) = queue.put(draft())

        claimed = queue.claim("w1")

        assert ids(claimed.claims) == [urgent.id, *ids(lost), after.id]
        assert queue.held_by(RETURNED) == []
        assert sorted(queue.held_by("w1")) == sorted(names(claimed.claims))

    @pytest.mark.parametrize(
        "limit",
        [
            ClaimBudget(1, 100, 1000),
            ClaimBudget(100, 5, 1000),
            ClaimBudget(100, 100, 19),
            ClaimBudget(100, 100, 1000, live_workers=4),
        ],
    )
    def test_jobs_that_were_given_back_keep_to_the_budget_and_the_share(self, queue: Queue, limit: ClaimBudget) -> None:
        lost = queue.hold("dead", *[draft(rows=3, tokens=10) for _ in range(3)])
        queue.lease.release("dead", gone=True)
        queue.put(draft(rows=3, tokens=10))

        claimed = queue.streams.claim("w1", limit)

        assert ids(claimed.claims) == ids(lost[:1])
        assert claimed.waiting == (0, 3, 0)

    def test_what_was_given_back_and_does_not_fit_is_not_overtaken(self, queue: Queue) -> None:
        lost = queue.hold("dead", draft(rows=50))
        queue.lease.release("dead", gone=True)
        queue.put(draft())

        claimed = queue.claim("busy", rows=4, empty_handed=False)

        assert (claimed.claims, claimed.blocked) == ([], 2)
        assert ids(queue.claim("idle", rows=4).claims) == ids(lost)

    def test_what_was_given_back_may_come_before_more_urgent_jobs_out_of_savings(self, queue: Queue) -> None:
        lost = queue.hold("dead", draft(rows=2), draft(rows=2))
        queue.lease.release("dead", gone=True)
        queue.put(draft(), draft(), priority=Priority.REALTIME)

        claims = queue.streams.claim("w1", ClaimBudget(2, 8, 1_000, saved=(3, 0))).claims

        assert [(claim.address.priority, claim.by_share) for claim in claims] == [
            (Priority.NORMAL, True),
            (Priority.REALTIME, False),
        ]
        assert claims[0].address.job_id == lost[0].address.job_id

    def test_an_entry_deleted_after_it_was_given_back_is_forgotten(self, queue: Queue) -> None:
        gone, kept = queue.hold("dead", draft(), draft())
        queue.lease.release("dead", gone=True)
        queue.client.xdel(queue.keys.stream(Priority.NORMAL), gone.address.entry)

        assert ids(queue.claim().claims) == ids([kept])
        assert queue.client.xpending(queue.keys.stream(Priority.NORMAL), GROUP)["pending"] == 1

    def test_a_job_of_a_newer_client_is_counted_claimed_and_cancelled_as_any_other(self, queue: Queue) -> None:
        job = draft(rows=7, tokens=70)
        queue.put(job)
        ((entry, fields),) = queue.jobs()
        queue.client.xdel(queue.keys.stream(Priority.NORMAL), entry)
        # As the protocol has it: behind the known fields, before the body.
        body = fields.pop(b"body")
        for _ in range(2):
            queue.put_raw({**fields, b"affinity": b"gpu0", b"body": body})
        at = queue.jobs()[1][0]
        queue.client.set(queue.keys.seen(job.id), f"2:{at}", px=60_000)

        (claim,) = queue.claim(rows=13, empty_handed=False).claims

        assert claim.job is not None
        assert (claim.job.rows, claim.job.tokens, claim.job.body) == (7, 70, body)
        assert queue.streams.cancel([job.id], CALLER) == ["waiting"]
        assert len(queue.jobs()) == 1

    def test_an_entry_of_a_newer_version_says_so_and_whom_to_tell(self, queue: Queue) -> None:
        job_id = draft().id
        queue.put_raw({b"v": b"2", b"id": job_id.encode(), b"client": CALLER.encode(), b"anything": b"\xff"})

        (claim,) = queue.claim().claims

        assert (claim.job, claim.newer) == (None, True)
        assert (claim.address.job_id, claim.address.client) == (job_id, CALLER)
        assert "version 2" in claim.malformed

    @pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED.keys())
    def test_a_malformed_entry_comes_marked_costs_one_row_and_hurts_nobody(
        self, queue: Queue, fields: dict[bytes, bytes]
    ) -> None:
        (before,) = queue.put(draft())
        queue.put_raw(fields)
        (after,) = queue.put(draft())

        claims = queue.claim(rows=3, tokens=1000).claims

        assert [bool(claim.malformed) for claim in claims] == [False, True, False]
        assert claims[1].job is None
        assert ids(claims) == [before.id, "" if fields.get(b"id") != b"0" * 32 else "0" * 32, after.id]

    def test_a_stream_without_its_group_is_reported(self, queue: Queue) -> None:
        queue.client.delete(queue.keys.stream(Priority.BATCH))

        with pytest.raises(redis.ResponseError, match=r"^NOGROUP .*q:batch"):
            queue.claim()

    def test_a_group_made_anew_starts_at_the_first_entry(self, queue: Queue) -> None:
        queue.client.delete(queue.keys.stream(Priority.NORMAL))
        (job,) = queue.put(draft())

        queue.streams.create_groups()

        assert ids(queue.claim().claims) == [job.id]

    def test_waiting_takes_one_job_a_stream_and_nothing_where_there_is_none(self, queue: Queue) -> None:
        first, _ = queue.put(draft(), draft())

        assert ids(queue.wait(wait_s=5.0).claims) == [first.id]
        queue.claim()
        assert queue.wait().claims == []

    def test_what_else_waits_is_claimed_behind_the_job_that_came(self, queue: Queue) -> None:
        first, second, third, _ = queue.put(draft(), draft(rows=2), draft(), draft())

        claimed = queue.wait(wait_s=5.0, jobs=2)

        assert (ids(claimed.claims), claimed.woken) == ([first.id, second.id, third.id], 1)
        assert claimed.waiting == (0, 1, 0)
