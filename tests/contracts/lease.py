"""What `beat`, `release` and `reclaim` promise, on any server."""

from __future__ import annotations

import pytest
from contracts.queue import LEASE_MS, Queue, draft, ids, names

from millstream.broker.contract.job import Priority
from millstream.broker.contract.keys import GROUP, RETURNED
from millstream.broker.queue.lease import is_live


class BeatContract:
    """A subclass gives the fixture `queue`."""

    def test_a_beat_extends_what_is_held_and_counts_no_attempt(self, queue: Queue) -> None:
        (claim,) = claims = queue.hold("w1", draft())
        queue.age("w1", claims, LEASE_MS - 1000)

        queue.lease.beat("w1", {}, names(claims))

        assert queue.idle_ms(claim) < LEASE_MS - 1000
        queue.lease.release("w1")
        assert queue.claim("w2").claims[0].attempts == 0.0

    def test_a_beat_leaves_young_entries_alone(self, queue: Queue) -> None:
        (claim,) = claims = queue.hold("w1", draft())
        queue.age("w1", claims, LEASE_MS // 4)

        queue.lease.beat("w1", {}, names(claims))

        assert queue.idle_ms(claim) >= LEASE_MS // 4

    def test_a_worker_that_has_to_load_its_model_lives_and_is_not_ready(self, queue: Queue) -> None:
        beat = queue.lease.beat

        assert (beat("w1", {}, []).live_workers, beat("w1", {}, []).ready_workers) == (1, 1)
        assert beat("w2", {"resident": 0}, []).ready_workers == 1
        assert (beat("w1", {}, []).live_workers, beat("w1", {}, []).ready_workers) == (2, 1)
        assert beat("w2", {"resident": 1}, []).ready_workers == 2
        assert beat("w1", {"resident": 0}, []).ready_workers == 1

    def test_a_beat_extends_the_entries_of_nobody_else(self, queue: Queue) -> None:
        (claim,) = claims = queue.hold("other", draft())
        queue.age("other", claims)

        queue.lease.beat("w1", {}, [])

        assert queue.idle_ms(claim) >= 2 * LEASE_MS

    def test_a_beat_hears_what_another_worker_has_taken_over(self, queue: Queue) -> None:
        lost, kept = queue.hold("w1", draft(), draft())
        queue.client.xclaim(queue.keys.stream(Priority.NORMAL), GROUP, "w2", 0, [lost.address.entry], justid=True)

        assert queue.lease.beat("w1", {}, names([lost, kept])).lost == names([lost])

    def test_a_beat_hears_what_was_delivered_to_this_worker_without_its_knowing(self, queue: Queue) -> None:
        known, stranger = queue.hold("w1", draft(), draft())
        queue.hold("w2", draft())

        assert queue.lease.beat("w1", {}, names([known])).unknown == names([stranger])
        assert queue.lease.beat("w1", {}, names([known, stranger])).unknown == []

    def test_however_many_entries_are_held_none_is_called_lost(self, queue: Queue) -> None:
        queue.open(max_queue_size=10_000)
        for _ in range(42):
            queue.put(*[draft() for _ in range(100)])
        held = [claim for _ in range(42) for claim in queue.claim("w1").claims]

        assert len(held) == 4_200
        assert queue.lease.beat("w1", {}, names(held)).lost == []

    def test_a_beat_counts_the_workers_that_live(self, queue: Queue) -> None:
        assert queue.lease.live_workers() == 0

        assert [queue.lease.beat(worker, {}, []).live_workers for worker in ("w1", "w2", "w2")] == [1, 2, 2]
        queue.silence("w1")

        assert queue.lease.beat("w2", {}, []).live_workers == 1
        assert queue.lease.live_workers() == 1

    def test_a_beat_publishes_the_worker_for_a_few_leases(self, queue: Queue) -> None:
        beat = queue.lease.beat("w1", {"state": "ready", "rows": 7}, [])

        worker = queue.client.hgetall(queue.keys.worker("w1"))
        assert worker == {b"state": b"ready", b"rows": b"7", b"beat": str(beat.now).encode()}
        assert LEASE_MS < queue.client.pttl(queue.keys.worker("w1")) <= 4 * LEASE_MS
        assert queue.client.pttl(queue.keys.workers()) > 0

    def test_a_beat_says_when_a_reclaim_pass_is_due(self, queue: Queue) -> None:
        assert queue.lease.beat("w1", {}, []).reclaim_due
        queue.reclaim()
        assert not queue.lease.beat("w1", {}, []).reclaim_due
        queue.passed(1500)
        assert queue.lease.beat("w1", {}, []).reclaim_due


class ReleaseContract:
    """A subclass gives the fixture `queue`."""

    def test_a_dead_workers_jobs_go_to_the_next_at_once_without_an_attempt(self, queue: Queue) -> None:
        claims = queue.hold("dead", draft(), draft())

        assert queue.lease.release("dead", gone=True) == 2

        again = queue.claim("w1").claims
        assert ids(again) == ids(claims)
        assert [claim.attempts for claim in again] == [0.0, 0.0]

    def test_only_what_was_running_takes_an_attempt(self, queue: Queue) -> None:
        running, waiting = queue.hold("dead", draft(), draft())

        queue.lease.release("dead", started=names([running]), gone=True)

        assert [(ids([c]), c.attempts) for c in queue.claim("w1").claims] == [(ids([waiting]), 0.0)]
        assert [(ids([c]), c.attempts) for c in queue.claim("w2").claims] == [(ids([running]), 1.0)]

    def test_what_is_kept_stays(self, queue: Queue) -> None:
        kept, lost = queue.hold("w1", draft(), draft())

        assert queue.lease.release("w1", keep=names([kept])) == 1

        assert queue.held_by("w1") == names([kept])
        assert queue.held_by(RETURNED) == names([lost])

    def test_only_what_is_named_is_given_back_where_it_is_named(self, queue: Queue) -> None:
        claims = queue.hold("w1", draft(), draft(), draft())

        assert queue.lease.release("w1", only=names(claims[1:2])) == 1

        assert ids(queue.claim("w2").claims) == ids(claims[1:2])

    def test_a_worker_that_is_gone_leaves_nothing_behind(self, queue: Queue) -> None:
        queue.hold("dead", draft())

        queue.lease.release("dead", gone=True)

        assert queue.lease.live_workers() == 0
        assert not queue.client.exists(queue.keys.worker("dead"))
        for stream in queue.keys.streams():
            assert b"dead" not in [consumer["name"] for consumer in queue.client.xinfo_consumers(stream, GROUP)]

    def test_releasing_again_changes_nothing(self, queue: Queue) -> None:
        claims = queue.hold("dead", draft())

        assert queue.lease.release("dead", started=names(claims), gone=True) == 1
        assert queue.lease.release("dead", started=names(claims), gone=True) == 0

        assert queue.claim("w1").claims[0].attempts == 1.0

    def test_releasing_where_a_stream_is_gone_gives_back_the_others(self, queue: Queue) -> None:
        queue.hold("dead", draft())
        queue.client.delete(queue.keys.stream(Priority.REALTIME))

        assert queue.lease.release("dead", gone=True) == 1


class LivenessContract:
    """A subclass gives the fixture `queue`. Beats ahead of the clock are what a step back of the clock leaves."""

    @pytest.mark.parametrize("age_ms", [-720 * LEASE_MS, -2 * LEASE_MS, -LEASE_MS // 2, 0, LEASE_MS // 2, LEASE_MS + 1])
    def test_beat_lease_reclaim_and_inspector_agree_on_who_lives(self, queue: Queue, age_ms: int) -> None:
        lives = is_live(queue.now() - age_ms, queue.now())
        claims = queue.hold("w1", draft())
        queue.age("w1", claims)
        queue.passed(1000)
        queue.client.zadd(queue.keys.workers(), {"w1": queue.now() - age_ms})

        assert queue.lease.beat("w2", {}, []).live_workers == 1 + lives
        assert queue.lease.live_workers() == 1 + lives
        assert {worker.consumer for worker in queue.view().workers} == ({"w1", "w2"} if lives else {"w2"})
        assert queue.reclaim() == ("done", 0 if lives else 1)


class ReclaimContract:
    """A subclass gives the fixture `queue`."""

    def test_passes_keep_a_distance(self, queue: Queue) -> None:
        queue.passed(100)

        assert queue.reclaim() == ("early", 0)

    def test_a_lost_hosts_jobs_are_given_back_with_half_an_attempt(self, queue: Queue) -> None:
        claims = queue.hold("lost", draft(), draft())
        queue.age("lost", claims)
        queue.silence("lost")
        queue.passed(1000)

        assert queue.reclaim() == ("done", 2)

        again = queue.claim("w1").claims
        assert ids(again) == ids(claims)
        assert [claim.attempts for claim in again] == [0.5, 0.5]

    def test_attempts_and_lost_hosts_add_up(self, queue: Queue) -> None:
        claims = queue.hold("dead", draft())
        queue.lease.release("dead", started=names(claims), gone=True)
        seen = []
        for consumer in ("h1", "h2", "h3"):
            claims = queue.claim(consumer).claims
            seen.append(claims[0].attempts)
            queue.age(consumer, claims)
            queue.passed(1000)
            assert queue.reclaim() == ("done", 1)

        assert seen == [1.0, 1.5, 2.0]
        assert queue.claim("w1", empty_handed=False).suspects == 2

    def test_after_a_gap_live_workers_first_get_a_lease_to_renew(self, queue: Queue) -> None:
        claims = queue.hold("frozen too", draft())
        queue.age("frozen too", claims)
        queue.silence("frozen too")
        queue.passed(LEASE_MS)

        assert queue.reclaim() == ("holding", 0)

        _, until = queue.last_pass()
        assert 0 < until - queue.now() <= LEASE_MS
        assert queue.held_by("frozen too") == names(claims)

    def test_the_first_pass_ever_holds_off(self, queue: Queue) -> None:
        assert queue.reclaim() == ("holding", 0)

    def test_holding_off_goes_on_through_later_passes_and_ends(self, queue: Queue) -> None:
        claims = queue.hold("lost", draft())
        queue.age("lost", claims)
        queue.silence("lost")

        queue.passed(1000, hold_ms=2000)
        assert queue.reclaim() == ("holding", 0)
        queue.passed(1000)
        assert queue.reclaim() == ("done", 1)

    def test_a_clock_that_stepped_back_holds_off_for_one_lease(self, queue: Queue) -> None:
        queue.passed(-3_600_000, hold_ms=3_600_000)

        assert queue.reclaim() == ("holding", 0)

        last, until = queue.last_pass()
        assert last <= queue.now()
        assert until <= queue.now() + LEASE_MS

    def test_a_beat_from_before_the_clock_stepped_back_keeps_nobody_alive(self, queue: Queue) -> None:
        claims = queue.hold("lost", draft())
        queue.age("lost", claims)
        queue.client.zadd(queue.keys.workers(), {"lost": queue.now() + 3_600_000})
        queue.passed(1000)

        assert queue.lease.beat("w1", {}, []).live_workers == 1
        assert queue.lease.live_workers() == 1
        assert queue.reclaim() == ("done", 1)

    def test_a_live_workers_jobs_stay_however_long_they_take(self, queue: Queue) -> None:
        claims = queue.hold("slow", draft())
        queue.age("slow", claims, 20 * LEASE_MS)
        queue.passed(1000)

        assert queue.reclaim() == ("done", 0)

        assert queue.held_by("slow") == names(claims)

    def test_a_silent_worker_keeps_what_it_renewed_within_the_lease(self, queue: Queue) -> None:
        claims = queue.hold("quiet", draft())
        queue.silence("quiet")
        queue.passed(1000)

        assert queue.reclaim() == ("done", 0)

        assert queue.held_by("quiet") == names(claims)

    def test_jobs_given_back_are_left_where_they_are(self, queue: Queue) -> None:
        claims = queue.hold("dead", draft())
        queue.lease.release("dead", gone=True)
        queue.age(RETURNED, claims)
        queue.passed(1000)

        assert queue.reclaim() == ("done", 0)

        assert queue.claim("w1").claims[0].attempts == 0.0

    def test_silent_workers_that_hold_nothing_are_forgotten(self, queue: Queue) -> None:
        queue.settle(queue.hold("gone", draft()))
        queue.silence("gone")
        queue.passed(1000)

        queue.reclaim()

        assert queue.client.zscore(queue.keys.workers(), "gone") is None
        consumers = queue.client.xinfo_consumers(queue.keys.stream(Priority.NORMAL), GROUP)
        assert b"gone" not in [consumer["name"] for consumer in consumers]

    def test_consumers_that_never_beat_and_hold_nothing_are_forgotten_once_they_are_many(self, queue: Queue) -> None:
        (held,) = queue.hold("w1", draft())
        queue.lease.beat("idle", {}, [])
        for name in ("w1", "idle", *(f"late read {at}" for at in range(30))):
            queue.client.xgroup_createconsumer(queue.keys.stream(Priority.NORMAL), GROUP, name)
        queue.passed(1000)

        assert queue.reclaim() == ("done", 0)

        consumers = queue.client.xinfo_consumers(queue.keys.stream(Priority.NORMAL), GROUP)
        assert {consumer["name"] for consumer in consumers} == {b"w1", b"idle"}
        assert queue.held_by("w1") == names([held])

    def test_a_silent_worker_that_holds_a_job_of_one_priority_stays_until_it_is_given_back(self, queue: Queue) -> None:
        claims = queue.hold("quiet", draft())
        queue.silence("quiet")
        queue.passed(1000)

        assert queue.reclaim() == ("done", 0)
        assert queue.client.zscore(queue.keys.workers(), "quiet") is not None
        queue.age("quiet", claims)
        queue.passed(1000)
        assert queue.reclaim() == ("done", 1)
        queue.passed(1000)
        assert queue.reclaim() == ("done", 0)
        assert queue.client.zscore(queue.keys.workers(), "quiet") is None

    def test_a_pass_leaves_a_key_that_expires(self, queue: Queue) -> None:
        queue.reclaim()

        assert 0 < queue.client.pttl(queue.keys.reclaim()) <= 3_600_000


class BellContract:
    """A subclass gives the fixture `queue`."""

    def test_jobs_that_are_given_back_wake_a_worker_that_sleeps(self, queue: Queue) -> None:
        (claim,) = queue.hold("dead", draft())
        queue.lease.release("dead", gone=True)

        woken = queue.wait("w1", wait_s=30.0, jobs=8)

        assert ids(woken.claims) == ids([claim])
        assert woken.woken == 0
        assert queue.client.xlen(queue.keys.bell()) == 0

    def test_a_host_that_is_lost_rings_too(self, queue: Queue) -> None:
        queue.age("lost", queue.hold("lost", draft()))
        queue.silence("lost")
        queue.passed(1000)

        assert queue.lease.reclaim() == 1

        assert len(queue.wait("w1", wait_s=30.0, jobs=8).claims) == 1

    def test_it_rings_at_most_four_times_and_nothing_is_left_of_who_read_it(self, queue: Queue) -> None:
        queue.hold("dead", *[draft() for _ in range(9)])
        queue.lease.release("dead", gone=True)
        assert queue.client.xlen(queue.keys.bell()) == 4

        for _ in range(4):
            queue.wait("w1", jobs=0)
        queue.lease.release("w1", gone=True)

        assert queue.client.xlen(queue.keys.bell()) == 0
        assert queue.client.xinfo_consumers(queue.keys.bell(), GROUP) == []

    def test_a_process_that_gives_back_its_own_jobs_rings_nobody(self, queue: Queue) -> None:
        queue.hold("ending", draft())

        assert queue.lease.release("ending", gone=True, ring=False) == 1

        assert queue.client.xlen(queue.keys.bell()) == 0
        assert len(queue.claim("w1").claims) == 1

    def test_nothing_that_was_given_back_rings_nobody(self, queue: Queue) -> None:
        assert queue.lease.release("nobody", gone=True) == 0

        assert queue.client.xlen(queue.keys.bell()) == 0
