"""What `enqueue`, `settle`, `cancel` and `purge` promise of detached calls, on any server."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import cast

import pytest
from contracts.queue import Queue, draft

from millstream.broker.contract.codec import decode_reply
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.job import Claim, Draft, Priority
from millstream.broker.contract.webhooks import Announcement
from millstream.broker.queue.stream_types import Admission, DetachedCall, Group, Settlement, Submitted
from millstream.broker.queue.webhooks import Entries

ACCEPTED, REUSED = Admission(), Admission("reused_key")
FULL = Admission("queue_full", 0.1, 3)
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
TTL_MS = 60_000
"""Of results, as the queue's workers have it."""


def detached(jobs: int, payload: str = "a", *, ttl_ms: int | None = None) -> DetachedCall:
    return DetachedCall(secrets.token_hex(16), jobs, payload, ttl_ms)


def leave(queue: Queue, call: DetachedCall, drafts: Sequence[Draft]) -> Admission:
    (admission,) = queue.streams.enqueue([Group(Priority.BATCH, drafts, call=call)])
    return admission


def left(queue: Queue, jobs: int, *, ttl_ms: int | None = None) -> tuple[DetachedCall, list[Draft], list[Claim]]:
    """A detached call whose jobs a worker holds."""
    call, drafts = detached(jobs, ttl_ms=ttl_ms), [draft(client="") for _ in range(jobs)]
    assert leave(queue, call, drafts) == ACCEPTED
    return call, drafts, queue.claim().claims


def life_ms(queue: Queue, call: DetachedCall) -> int:
    return int(queue.client.pttl(queue.keys.call(call.id)))


class DetachedContract:
    """A subclass gives the fixture `queue`."""

    def test_an_entry_names_its_call_and_its_answer_goes_there(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 2)
        assert [claim.address.call for claim in claims] == [call.id] * 2
        assert queue.streams.submitted(call.id) == Submitted("a", 0)

        assert queue.settle(claims[1:], b"second") == ["answered"]

        assert queue.streams.submitted(call.id) == Submitted("a", 1)
        assert queue.streams.results(call.id, [each.id for each in drafts]) == [None, b"second"]

    def test_results_expire_together_after_the_last_one(self, queue: Queue) -> None:
        call, _, claims = left(queue, 3)
        assert life_ms(queue, call) > 365 * DAY_MS

        for claim in claims[:2]:
            queue.settle([claim])
            assert life_ms(queue, call) > 365 * DAY_MS
        queue.settle(claims[2:])

        assert 0 < life_ms(queue, call) <= TTL_MS

    @pytest.mark.parametrize("ttl_ms", [5_000, 10 * TTL_MS])
    def test_results_live_as_long_as_their_call_says(self, queue: Queue, ttl_ms: int) -> None:
        call, _, claims = left(queue, 2, ttl_ms=ttl_ms)

        queue.settle(claims)

        assert ttl_ms - 5_000 < life_ms(queue, call) <= ttl_ms

    def test_while_the_rest_of_a_call_may_still_be_submitted_its_results_stay(self, queue: Queue) -> None:
        call, drafts = detached(2, ttl_ms=1), [draft(client="") for _ in range(2)]
        leave(queue, call, drafts[:1])
        queue.settle(queue.claim().claims)
        assert HOUR_MS - 60_000 < life_ms(queue, call) <= HOUR_MS

        leave(queue, call, drafts[1:])

        assert life_ms(queue, call) > 365 * DAY_MS
        assert queue.streams.submitted(call.id) == Submitted("a", 1)

    @pytest.mark.parametrize("how", ["cancelled", "purged", "buried"])
    def test_a_job_that_ends_in_another_way_is_a_result_too(self, queue: Queue, how: str) -> None:
        call, drafts, claims = left(queue, 1)
        rest = draft(client="")
        two = call._replace(jobs=2)
        leave(queue, two, [rest])
        queue.settle(claims)
        assert life_ms(queue, call) > 365 * DAY_MS

        if how == "cancelled":
            assert queue.streams.cancel([rest.id, drafts[0].id], "", call.id) == ["waiting", "gone"]
        elif how == "purged":
            assert queue.streams.purge() == 1
        else:
            queue.settle(queue.claim().claims, b"lost", bury="max_attempts")

        first, second = queue.streams.results(call.id, [drafts[0].id, rest.id])
        assert first == b"reply"
        assert second == b"lost" if how == "buried" else isinstance(decode_reply(second or b"").error, Cancelled)
        assert 0 < life_ms(queue, call) <= TTL_MS

    def test_submitting_again_changes_nothing_whatever_became_of_the_jobs(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 3)

        assert leave(queue, call, drafts) == ACCEPTED
        queue.settle(claims[:1])
        queue.client.delete(*(queue.keys.seen(each.id) for each in drafts))
        assert leave(queue, call, drafts) == ACCEPTED
        queue.settle(claims[1:])
        assert leave(queue, call, drafts) == ACCEPTED

        assert queue.depth() == 0
        assert queue.streams.submitted(call.id) == Submitted("a", 3)

    def test_of_a_call_that_was_accepted_in_part_only_the_rest_enters(self, queue: Queue) -> None:
        call, drafts = detached(4), [draft(client="") for _ in range(4)]
        leave(queue, call, [drafts[1], drafts[3]])

        assert leave(queue, call, drafts) == ACCEPTED

        assert sorted(claim.address.job_id for claim in queue.claim().claims) == sorted(each.id for each in drafts)

    def test_a_full_queue_refuses_the_rest_of_a_call_and_not_what_it_has_already(self, queue: Queue) -> None:
        queue.open(max_queue_size=3)
        call, drafts = detached(4), [draft(client="") for _ in range(4)]
        leave(queue, call, drafts[:2])

        assert leave(queue, call, drafts[:3]) == ACCEPTED
        assert leave(queue, call, drafts) == FULL
        assert leave(queue, call, drafts[:3]) == ACCEPTED

        assert queue.depth() == 3

    def test_a_call_is_not_accepted_with_another_payload_not_even_in_part(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 1)

        assert leave(queue, call._replace(payload="b"), drafts) == REUSED
        assert leave(queue, call._replace(payload="b"), [draft(client="")]) == REUSED
        queue.settle(claims)
        assert leave(queue, call._replace(payload="b"), drafts) == REUSED

        assert queue.depth() == 0
        assert queue.client.exists(queue.keys.refused()) == 0

    def test_a_call_whose_results_have_expired_runs_anew_although_its_jobs_are_known_by_their_ids(
        self, queue: Queue
    ) -> None:
        call, drafts, claims = left(queue, 2)
        queue.settle(claims)
        queue.client.delete(queue.keys.call(call.id))
        assert queue.client.exists(queue.keys.seen(drafts[0].id))

        assert leave(queue, call._replace(payload="b"), drafts) == ACCEPTED

        again = queue.claim().claims
        assert queue.settle(again, b"again") == ["answered"] * 2
        assert queue.streams.results(call.id, [each.id for each in drafts]) == [b"again"] * 2

    def test_results_that_are_about_to_expire_live_on_for_those_who_submit_again(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 1, ttl_ms=TTL_MS)
        queue.settle(claims)
        queue.client.pexpire(queue.keys.call(call.id), 100)

        assert leave(queue, call, drafts) == ACCEPTED

        assert TTL_MS - 5_000 < life_ms(queue, call) <= TTL_MS

    def test_an_answer_is_not_replaced(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 1)
        ((_, fields),) = queue.jobs(Priority.BATCH)
        queue.settle(claims, b"true")
        queue.client.delete(queue.keys.seen(drafts[0].id))
        queue.put_raw(fields, Priority.BATCH)

        assert queue.settle(queue.claim().claims, b"forged") == ["unwritable"]

        assert queue.streams.results(call.id, [drafts[0].id]) == [b"true"]

    def test_an_answer_to_a_call_that_is_gone_expires(self, queue: Queue) -> None:
        call, _, claims = left(queue, 2)
        queue.client.delete(queue.keys.call(call.id))

        assert queue.settle(claims) == ["answered"] * 2

        assert 0 < life_ms(queue, call) <= TTL_MS

    def test_a_job_is_known_for_as_long_as_it_waits_whatever_its_deadline(self, queue: Queue) -> None:
        call, job = detached(1), draft(client="", deadline=time.monotonic() + 1)
        leave(queue, call, [job])

        assert queue.client.pttl(queue.keys.seen(job.id)) > 365 * DAY_MS

    def test_a_malformed_entry_of_a_call_is_answered_there(self, queue: Queue) -> None:
        call, drafts, claims = left(queue, 1)
        ((_, fields),) = queue.jobs(Priority.BATCH)
        queue.settle(claims)
        queue.put_raw({**fields, b"id": secrets.token_hex(16).encode(), b"rows": b"many"}, Priority.BATCH)

        (claim,) = queue.claim().claims

        assert claim.malformed
        assert claim.address.call == call.id
        assert queue.settle([claim], bury="malformed") == ["answered"]
        assert queue.streams.results(call.id, [drafts[0].id, claim.address.job_id]) == [b"reply", b"reply"]


class WebhookContract:
    """A subclass gives the fixture `queue`."""

    def test_a_call_with_a_webhook_is_announced_in_the_step_that_answers_its_last_job(self, queue: Queue) -> None:
        call, drafts = hooked(2), [draft(2, client="") for _ in range(2)]
        leave(queue, call, drafts)
        claims = queue.claim().claims

        queue.streams.settle([Settlement(claims[0].address, b"one", failed={"model_failed": 1})])
        assert announced(queue) == []
        queue.settle(claims[1:])

        (announcement,) = announced(queue)
        assert (announcement.call, announcement.rows, announcement.failed) == (call.id, 4, 1)
        assert (announcement.url, announcement.state) == (URL, "partly_failed")
        assert queue.streams.submitted(call.id) == Submitted(call.payload, 2)

    def test_a_call_is_announced_once_however_often_its_jobs_are_settled_or_sent(self, queue: Queue) -> None:
        call, drafts = hooked(1), [draft(4, client="")]
        leave(queue, call, drafts)
        claims = queue.claim().claims

        assert queue.settle(claims) == ["answered"]
        assert queue.settle(claims) == ["late"]
        leave(queue, call, drafts)

        assert [each.state for each in announced(queue)] == ["done"]

    def test_a_call_whose_last_job_is_cancelled_is_announced(self, queue: Queue) -> None:
        call, drafts = hooked(2), [draft(2, client="") for _ in range(2)]
        leave(queue, call, drafts)

        queue.streams.cancel([each.id for each in drafts], "", call.id)

        assert [(each.state, each.failed) for each in announced(queue)] == [("failed", 4)]

    def test_a_call_whose_last_job_is_purged_is_announced(self, queue: Queue) -> None:
        leave(queue, hooked(2), [draft(2, client="") for _ in range(2)])

        assert queue.streams.purge() == 2

        assert [(each.state, each.failed) for each in announced(queue)] == [("failed", 4)]

    def test_a_call_whose_last_job_is_buried_is_announced(self, queue: Queue) -> None:
        leave(queue, hooked(1), [draft(4, client="")])
        (claim,) = queue.claim().claims

        queue.streams.settle([Settlement(claim.address, b"no", "max_attempts", {"worker_lost": 4})])

        assert [(each.state, each.failed) for each in announced(queue)] == [("failed", 4)]

    def test_a_call_that_was_not_submitted_to_its_end_is_not_announced(self, queue: Queue) -> None:
        leave(queue, hooked(2), [draft(2, client="")])

        queue.settle(queue.claim().claims)

        assert announced(queue) == []

    def test_a_call_without_a_webhook_is_not_announced(self, queue: Queue) -> None:
        leave(queue, detached(1, "4x4 "), [draft(4, client="")])

        queue.settle(queue.claim().claims)

        assert not queue.client.exists(queue.keys.webhooks())

    def test_announcements_that_nobody_sends_are_bounded_and_expire(self, queue: Queue) -> None:
        long = detached(1, f"4x4  {URL}{'a' * 4_096}")
        for call in (hooked(1), long):
            leave(queue, call, [draft(4, client="")])
        queue.settle(queue.claim().claims)

        assert len(announced(queue)) == 1
        assert 0 < queue.client.pttl(queue.keys.webhooks()) <= 2 * DAY_MS


URL = "https://hooks.example.com/a?b=1"


def hooked(jobs: int) -> DetachedCall:
    """A call of 4 rows that has a webhook."""
    return detached(jobs, f"4x2  {URL}")


def announced(queue: Queue) -> list[Announcement]:
    entries = cast(Entries, queue.client.xrange(queue.keys.webhooks()))
    return [Announcement.of("s", entry.decode(), fields) for entry, fields in entries]
