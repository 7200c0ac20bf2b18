"""What the rate limit of `enqueue` promises, on any server. Time passes by moving the bucket's stamp back."""

from __future__ import annotations

import pytest
from contracts.queue import Queue, draft

from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.stream_types import Admission, Group

ACCEPTED = Admission()
OVER = Admission("over_burst")


class RateContract:
    """A subclass gives the fixture `queue`."""

    @staticmethod
    def limit(queue: Queue, **fields: float | str) -> None:
        queue.client.hset(queue.keys.spec(), mapping={f"rate_{name}": value for name, value in fields.items()})

    @staticmethod
    def send(queue: Queue, *drafts: Draft, calls: int = 1) -> Admission:
        (admission,) = queue.streams.enqueue([Group(Priority.NORMAL, list(drafts) or [draft()], calls)])
        return admission

    @staticmethod
    def passes(queue: Queue, seconds: float, tenant: str = "") -> None:
        bucket = queue.keys.bucket(tenant)
        queue.client.hincrbyfloat(bucket, "at", -seconds)

    def test_one_seconds_worth_is_admitted_at_once_and_then_it_says_when_to_try_again(self, queue: Queue) -> None:
        self.limit(queue, requests=4)

        assert [self.send(queue) for _ in range(4)] == [ACCEPTED] * 4
        refused = self.send(queue)
        assert refused.refused == "rate_limited"
        assert 0 < refused.retry_after <= 0.25
        assert queue.depth() == 4

    def test_what_is_used_comes_back_with_time_and_never_beyond_the_burst(self, queue: Queue) -> None:
        self.limit(queue, requests=1, burst_s=3)
        assert [self.send(queue).refused for _ in range(4)] == ["", "", "", "rate_limited"]

        self.passes(queue, 2)
        assert [self.send(queue).refused for _ in range(3)] == ["", "", "rate_limited"]
        self.passes(queue, 1_000)
        assert [self.send(queue).refused for _ in range(4)] == ["", "", "", "rate_limited"]

    def test_a_call_is_charged_once_and_its_rows_and_tokens_with_each_part(self, queue: Queue) -> None:
        self.limit(queue, requests=1, rows=6, tokens=100)

        assert self.send(queue, draft(rows=2), draft(rows=1)) == ACCEPTED
        assert self.send(queue, draft(rows=3), calls=0) == ACCEPTED
        assert self.send(queue, draft(rows=1), calls=0).refused == "rate_limited"

    def test_the_later_jobs_of_a_call_do_not_pass_its_first_one(self, queue: Queue) -> None:
        self.limit(queue, requests=1)
        self.send(queue)
        call = [Group(Priority.NORMAL, [draft()], calls) for calls in (1, 0, 0)]

        refused = queue.streams.enqueue(call)
        self.passes(queue, 1)

        assert [each.refused for each in refused] == ["rate_limited"] * 3
        assert queue.streams.enqueue(call) == [ACCEPTED] * 3

    def test_a_job_refused_for_the_rate_holds_up_its_own_priority_and_tenant_only(self, queue: Queue) -> None:
        self.limit(queue, rows=2, per="tenant")
        groups = [
            Group(Priority.NORMAL, [draft(rows=2, tenant="a")]),
            Group(Priority.NORMAL, [draft(rows=2, tenant="a")]),
            Group(Priority.NORMAL, [draft(rows=2, tenant="b")]),
        ]

        assert [each.refused for each in queue.streams.enqueue(groups)] == ["", "rate_limited", ""]

    def test_tokens_are_limited_too(self, queue: Queue) -> None:
        self.limit(queue, tokens=10)

        assert self.send(queue, draft(tokens=8)) == ACCEPTED
        refused = self.send(queue, draft(tokens=7))
        assert refused.refused == "rate_limited"
        assert refused.retry_after == pytest.approx(0.5, abs=0.1)

    def test_what_costs_more_than_the_burst_is_refused_for_good(self, queue: Queue) -> None:
        self.limit(queue, rows=10)

        assert self.send(queue, draft(rows=11)) == OVER
        assert self.send(queue, draft(rows=10)) == ACCEPTED

    def test_what_is_refused_or_sent_again_is_not_charged(self, queue: Queue) -> None:
        self.limit(queue, rows=10)
        job = draft(rows=6)
        assert self.send(queue, job) == ACCEPTED

        assert self.send(queue, draft(rows=9)).refused == "rate_limited"
        assert self.send(queue, job) == ACCEPTED
        assert self.send(queue, draft(rows=4)) == ACCEPTED

    def test_a_full_queue_charges_nobody(self, queue: Queue) -> None:
        queue.open(max_queue_size=1)
        self.limit(queue, requests=2)
        queue.put(draft())

        assert [self.send(queue).refused for _ in range(5)] == ["queue_full"] * 5
        queue.settle(queue.claim().claims)
        assert self.send(queue) == ACCEPTED

    def test_tenants_share_one_bucket_unless_each_has_its_own(self, queue: Queue) -> None:
        self.limit(queue, requests=1)
        assert self.send(queue, draft(tenant="a")) == ACCEPTED
        assert self.send(queue, draft(tenant="b")).refused == "rate_limited"

        self.limit(queue, per="tenant")

        assert self.send(queue, draft(tenant="a")) == ACCEPTED
        assert self.send(queue, draft(tenant="b")) == ACCEPTED
        assert self.send(queue, draft(tenant="b")).refused == "rate_limited"

    def test_a_clock_that_stepped_back_refills_nothing(self, queue: Queue) -> None:
        self.limit(queue, requests=1)
        assert self.send(queue) == ACCEPTED

        self.passes(queue, -3_600)

        assert self.send(queue).refused == "rate_limited"

    def test_after_a_clock_stepped_back_the_limit_goes_on_from_there(self, queue: Queue) -> None:
        self.limit(queue, requests=1)
        assert self.send(queue) == ACCEPTED
        self.passes(queue, -3_600)
        assert self.send(queue).refused == "rate_limited"

        self.passes(queue, 1)

        assert self.send(queue) == ACCEPTED

    def test_a_changed_limit_binds_the_next_call(self, queue: Queue) -> None:
        self.limit(queue, requests=1)
        assert [self.send(queue).refused for _ in range(2)] == ["", "rate_limited"]

        self.limit(queue, requests="")

        assert [self.send(queue) for _ in range(5)] == [ACCEPTED] * 5

    def test_a_bucket_lives_until_it_is_full_again(self, queue: Queue) -> None:
        self.limit(queue, requests=1, burst_s=10)
        self.send(queue)

        assert 10 <= queue.client.ttl(queue.keys.bucket()) <= 11

    def test_what_is_beyond_the_limit_runs_in_the_class_that_takes_it(self, queue: Queue) -> None:
        self.limit(queue, requests=2, per="tenant", beyond=3)

        sent = [draft(tenant="acme") for _ in range(4)]
        other = draft(tenant="other")
        groups = [Group(Priority.REALTIME, [each]) for each in (*sent, other)]

        assert queue.streams.enqueue(groups) == [ACCEPTED] * 5
        kept = [fields[b"id"].decode() for _, fields in queue.jobs(Priority.REALTIME)]
        beyond = [fields[b"id"].decode() for _, fields in queue.jobs(Priority.BATCH)]
        assert (kept, beyond) == ([sent[0].id, sent[1].id, other.id], [sent[2].id, sent[3].id])
        assert queue.totals().jobs[Priority.BATCH] == 2

    def test_a_group_that_exceeds_a_full_bucket_runs_in_the_class_that_takes_it(self, queue: Queue) -> None:
        self.limit(queue, rows=2, beyond=2)

        assert queue.streams.enqueue([Group(Priority.REALTIME, [draft(rows=3)])]) == [ACCEPTED]
        assert len(queue.jobs(Priority.NORMAL)) == 1

    def test_what_is_beyond_the_limit_is_refused_if_that_class_is_full(self, queue: Queue) -> None:
        self.limit(queue, requests=1, beyond=3)
        queue.client.hset(queue.keys.spec(), "max_queue_batch", 1)

        groups = [Group(Priority.REALTIME, [draft()]) for _ in range(3)]

        assert queue.streams.enqueue(groups) == [ACCEPTED, ACCEPTED, Admission("queue_full", 0.1, 1)]

    def test_a_batch_job_beyond_the_limit_stays_a_batch_job(self, queue: Queue) -> None:
        self.limit(queue, requests=1, beyond=2)

        assert queue.streams.enqueue([Group(Priority.BATCH, [draft()]) for _ in range(2)]) == [ACCEPTED] * 2
        assert len(queue.jobs(Priority.BATCH)) == 2
