"""What `settle` promises, on any server."""

from __future__ import annotations

import secrets

from contracts.queue import CALLER, Queue, draft, ids

from millstream.broker.contract.job import Address, Priority
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.stream_types import Settlement
from millstream.broker.queue.streams import REPLY_TTL_MS

SEEN_AFTER_SETTLE_MS = 20_000


class SettleContract:
    """A subclass gives the fixture `queue`."""

    def test_the_answer_reaches_the_client_and_the_entry_is_gone(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft(), draft(client="other"))

        assert queue.settle(claims, b"\x00\xffvectors") == ["answered", "answered"]

        assert queue.replies() == [(claims[0].address.job_id, b"\x00\xffvectors")]
        assert queue.replies("other") == [(claims[1].address.job_id, b"\x00\xffvectors")]
        assert queue.depth() == 0
        assert queue.client.xpending(queue.keys.stream(Priority.NORMAL), GROUP)["pending"] == 0

    def test_a_late_twin_is_dropped(self, queue: Queue) -> None:
        claims = queue.hold("slow", draft())
        queue.lease.release("slow", gone=True)
        again = queue.claim("fast").claims

        assert queue.settle(again, b"first") == ["answered"]
        assert queue.settle(claims, b"second", "max_attempts") == ["late"]

        assert queue.replies() == [(claims[0].address.job_id, b"first")]
        assert queue.dead_letters() == []

    def test_an_entry_that_calls_itself_by_another_jobs_id_answers_nobody(self, queue: Queue) -> None:
        queue.put(draft())
        ((entry, fields),) = queue.jobs()
        queue.put_raw({**fields, b"body": b'{"inputs":["forged"]}'})
        true, forged = queue.claim().claims
        ttl = queue.client.pttl(queue.keys.seen(true.address.job_id))

        assert queue.settle([forged], b"forged") == ["unwritable"]

        assert queue.replies() == []
        assert [letter[b"reason"] for letter in queue.dead_letters()] == [b"malformed: its id is another job's"]
        assert abs(queue.client.pttl(queue.keys.seen(true.address.job_id)) - ttl) < SEEN_AFTER_SETTLE_MS
        assert queue.settle([true], b"true") == ["answered"]
        assert queue.replies() == [(fields[b"id"].decode(), b"true")]
        assert (true.address.entry, queue.depth()) == (entry, 0)

    def test_an_entry_of_another_stream_with_the_same_entry_id_answers_nobody(self, queue: Queue) -> None:
        queue.put(draft())
        ((entry, fields),) = queue.jobs()
        # As where somebody writes it within the same ms.
        queue.put_raw(fields, Priority.BATCH, entry)
        true, forged = queue.claim().claims

        assert queue.settle([forged], b"forged") == ["unwritable"]

        assert queue.replies() == []
        assert queue.settle([true], b"true") == ["answered"]
        assert queue.replies() == [(true.address.job_id, b"true")]

    def test_a_job_that_a_client_of_an_older_version_sent_is_answered(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", draft())
        queue.client.set(queue.keys.seen(claim.address.job_id), claim.address.entry, px=60_000)

        assert queue.settle([claim]) == ["answered"]

    def test_a_job_twice_in_one_call_is_answered_once(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft())

        assert queue.settle(claims * 2) == ["answered", "late"]

        assert len(queue.replies()) == 1

    def test_a_job_nobody_claimed_is_not_answered(self, queue: Queue) -> None:
        queue.put(draft())
        ((entry, fields),) = queue.jobs()

        address = Address(f"2:{entry}", fields[b"id"].decode(), CALLER)
        assert queue.streams.settle([Settlement(address, b"reply")]) == ["late"]

        assert (queue.replies(), queue.depth()) == ([], 1)

    def test_a_detached_jobs_answer_stays_for_its_lifetime(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", draft(client=""))

        assert queue.settle([claim]) == ["answered"]

        result = queue.keys.result(claim.address.job_id)
        assert queue.client.get(result) == b"reply"
        assert 0 < queue.client.pttl(result) <= 60_000
        assert SEEN_AFTER_SETTLE_MS < queue.client.pttl(queue.keys.seen(claim.address.job_id)) <= 60_000

    def test_replies_and_what_makes_a_job_known_live_for_a_while_only(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", draft())

        queue.settle([claim])

        assert REPLY_TTL_MS - 60_000 < queue.client.pttl(queue.keys.reply(CALLER)) <= REPLY_TTL_MS
        assert 0 < queue.client.pttl(queue.keys.seen(claim.address.job_id)) <= SEEN_AFTER_SETTLE_MS

    def test_an_entry_without_a_job_id_is_retired_without_an_answer(self, queue: Queue) -> None:
        queue.put_raw({b"hello": b"world"})
        claims = queue.claim().claims

        assert queue.settle(claims, bury="malformed") == ["answered"]

        assert queue.depth() == 0
        assert [letter[b"hello"] for letter in queue.dead_letters()] == [b"world"]
        assert not list(queue.client.scan_iter(queue.keys.reply("*")))

    def test_a_buried_job_is_answered_and_its_copy_can_be_run_again(self, queue: Queue) -> None:
        (claim,) = queue.hold("w1", draft())
        ((_, fields),) = queue.jobs()

        assert queue.settle([claim], b"an error", "max_attempts") == ["answered"]

        ours = {b"reason": b"max_attempts", b"entry": claim.address.entry.encode(), b"priority": b"normal"}
        ours |= {b"attempts": b"0", b"consumer": b"w1"}
        (letter,) = queue.dead_letters()
        assert letter.pop(b"buried").isdigit()
        assert letter == ours | fields
        assert queue.replies() == [(claim.address.job_id, b"an error")]

    def test_an_entry_of_many_fields_is_buried_in_part(self, queue: Queue) -> None:
        queue.put_raw({f"field-{i}".encode(): b"x" for i in range(20_000)})

        assert queue.settle(queue.claim().claims, bury="malformed") == ["answered"]

        assert (len(queue.dead_letters()), queue.depth()) == (1, 0)

    def test_a_reply_that_cannot_be_written_is_buried_and_hurts_no_neighbour(self, queue: Queue) -> None:
        before, broken, after = queue.hold("w1", draft(), draft(client="broken"), draft())
        queue.client.set(queue.keys.reply("broken"), "not a stream", px=60_000)

        assert queue.settle([before, broken, after]) == ["answered", "unwritable", "answered"]

        assert [job_id for job_id, _ in queue.replies()] == ids([before, after])
        assert [letter[b"reason"] for letter in queue.dead_letters()] == [b"reply_unwritable"]
        assert [letter[b"id"].decode() for letter in queue.dead_letters()] == ids([broken])
        assert queue.depth() == 0
        assert queue.client.pttl(queue.keys.reply(CALLER)) > 0

    def test_each_priority_is_settled_in_its_own_stream(self, queue: Queue) -> None:
        for priority in Priority:
            queue.put(draft(), priority=priority)

        assert queue.settle(queue.claim().claims) == ["answered"] * 3

        assert queue.depth() == 0

    def test_settling_what_never_was_changes_nothing(self, queue: Queue) -> None:
        address = Address("2:1-1", secrets.token_hex(16), CALLER)

        assert queue.streams.settle([Settlement(address, b"reply", "reason")]) == ["late"]

        assert (queue.replies(), queue.dead_letters()) == ([], [])
