"""What `claim`, `release` and `reclaim` promise of jobs whose worker died while it ran them, on any server."""

from __future__ import annotations

from typing import cast

import pytest
from contracts.queue import CALLER, Queue, draft, ids, names

from millstream.broker.contract.job import Claim, Draft, Priority
from millstream.broker.contract.keys import GROUP
from millstream.broker.queue.claims import ClaimBudget, Claimed


def suspects(queue: Queue, count: int) -> list[Claim]:
    """So many jobs that their worker ran as it died."""
    claims = queue.hold("dead", *[draft() for _ in range(count)])
    queue.lease.release("dead", started=names(claims), gone=True)
    return claims


def die(queue: Queue, consumer: str, claimed: Claimed) -> None:
    """As if `consumer` died while it ran all of `claimed`."""
    queue.lease.release(consumer, started=names(claimed.claims), gone=True)


def claim(queue: Queue, consumer: str = "w1", *, max_attempts: int = 3, saved: tuple[int, int] = (0, 0)) -> Claimed:
    """For a worker that holds nothing, and whose micro-batches have 8 rows."""
    limit = ClaimBudget(100, 100, 1_000, empty_handed=True, saved=saved, next_rows=8, max_attempts=max_attempts)
    return queue.streams.claim(consumer, limit)


def use_realtime(queue: Queue) -> None:
    """A realtime job comes and is answered."""
    queue.put(draft(), priority=Priority.REALTIME)
    queue.settle(queue.streams.claim("left", ClaimBudget(1, 1, 100, streams=1, returned=1)).claims)


class SuspectsContract:
    """A subclass gives the fixture `queue`."""

    def test_a_suspect_waits_for_a_worker_that_holds_nothing(self, queue: Queue) -> None:
        (suspect,) = suspects(queue, 1)

        busy, idle = queue.claim("busy", empty_handed=False), queue.claim("idle")

        assert (busy.claims, busy.suspects) == ([], 2)
        assert (ids(idle.claims), idle.suspects) == (ids([suspect]), 0)
        assert idle.claims[0].attempts == 1.0

    def test_suspects_run_in_groups_that_shrink_until_each_is_alone(self, queue: Queue) -> None:
        batch = suspects(queue, 64)

        group = claim(queue, "w1")
        assert (ids(group.claims), group.suspects) == (ids(batch[:8]), 2)
        die(queue, "w1", group)
        sizes = [len(claim(queue, f"w{n}").claims) for n in range(2, 17)]

        # Eight that died twice, each alone, and the other groups of eight.
        assert sorted(sizes) == [1] * 8 + [8] * 7
        assert claim(queue, "w17").claims == []

    @pytest.mark.parametrize(("max_attempts", "most"), [(1, 1), (2, 1), (3, 8), (4, 16), (5, 22)])
    def test_how_far_a_group_shrinks_follows_from_the_attempts_that_are_left(
        self, queue: Queue, max_attempts: int, most: int
    ) -> None:
        suspects(queue, 64)

        assert len(claim(queue, max_attempts=max_attempts).claims) == most

    @pytest.mark.parametrize("max_attempts", [2, 3, 5])
    def test_the_last_attempt_of_each_is_made_alone(self, queue: Queue, max_attempts: int) -> None:
        suspects(queue, 40)

        for worker in range(400):
            claimed = claim(queue, f"w{worker}", max_attempts=max_attempts)
            if not claimed.claims:
                break
            if max(each.attempts for each in claimed.claims) == max_attempts - 1:
                assert len(claimed.claims) == 1
                queue.settle(claimed.claims)
            else:
                die(queue, f"w{worker}", claimed)

        assert queue.depth() == 0

    def test_suspects_of_two_batches_never_run_together(self, queue: Queue) -> None:
        first, second = (queue.hold(consumer, *[draft() for _ in range(10)]) for consumer in ("one", "two"))
        for consumer, batch in (("one", first), ("two", second)):
            queue.lease.release(consumer, started=names(batch), gone=True)
        for worker in ("w1", "w2"):
            queue.lease.beat(worker, {}, [])

        claims = [claim(queue, f"w{n}").claims for n in range(8)]

        assert [ids(each) for each in claims] == [
            ids(batch[at : at + 3]) for batch in (first, second) for at in (0, 3, 6, 9)
        ]

    def test_a_suspect_of_another_batch_makes_a_group_no_smaller(self, queue: Queue) -> None:
        first = queue.hold("one", draft())
        other = queue.hold("two", draft())
        first += queue.hold("one", *[draft() for _ in range(9)])
        for consumer, batch in (("one", first), ("two", other)):
            queue.lease.release(consumer, started=names(batch), gone=True)

        assert ids(claim(queue, "w1").claims) == ids(first[:3])
        assert ids(claim(queue, "w2").claims) == ids(other)

    def test_many_suspects_hide_no_job_that_was_given_back_with_them(self, queue: Queue) -> None:
        queue.put(*[draft() for _ in range(257)])
        claims = queue.claim("dead", jobs=257, rows=257).claims
        queue.lease.release("dead", started=names(claims[:250]), gone=True)

        busy = queue.claim("busy", empty_handed=False)

        assert ids(busy.claims) == ids(claims[250:])
        assert busy.waiting == (0, 250, 0)

    def test_suspects_that_were_deleted_hide_no_new_job(self, queue: Queue) -> None:
        batch = suspects(queue, 4)
        # As a client cancels them, whose user may not acknowledge.
        queue.client.xdel(queue.keys.stream(Priority.NORMAL), *[each.address.entry for each in batch[:3]])
        fresh = queue.put(draft(), draft())

        busy = queue.claim("busy", empty_handed=False)
        assert (ids(busy.claims), busy.waiting) == ([each.id for each in fresh], (0, 1, 0))
        assert ids(claim(queue, "idle").claims) == ids(batch[3:])
        assert queue.client.xpending(queue.keys.stream(Priority.NORMAL), GROUP)["pending"] == 3

    def test_suspects_run_with_no_fresh_job_nor_with_one_that_was_given_back(self, queue: Queue) -> None:
        neighbour, *running = queue.hold("dead", draft(), draft(), draft(), draft(), draft())
        queue.lease.release("dead", started=names(running), gone=True)
        (fresh,) = queue.put(draft())

        innocent = claim(queue, "w1")
        queue.put(draft())
        group = claim(queue, "w2")

        # A neighbour that did not run is an ordinary job, and comes first.
        assert (ids(innocent.claims), innocent.suspects) == ([neighbour.address.job_id, fresh.id], 2)
        assert ids(group.claims) == ids(running[:2])

    def test_a_suspect_comes_before_new_jobs_of_its_stream_and_after_more_urgent_ones(self, queue: Queue) -> None:
        (suspect,) = suspects(queue, 1)
        (urgent,) = queue.put(draft(), priority=Priority.REALTIME)
        queue.put(draft())
        queue.put(draft(), priority=Priority.BATCH)

        first, second = claim(queue, "w1"), claim(queue, "w2")

        assert ids(first.claims)[0] == urgent.id
        assert suspect.address.job_id not in ids(first.claims)
        assert first.suspects == 2
        assert ids(second.claims) == ids([suspect])

    def test_a_suspect_comes_before_more_urgent_jobs_out_of_what_its_class_saved(self, queue: Queue) -> None:
        batch = suspects(queue, 4)
        queue.put(*[draft() for _ in range(8)], priority=Priority.REALTIME)

        assert {each.address.priority for each in claim(queue, "w1", saved=(7, 0)).claims} == {Priority.REALTIME}
        queue.put(draft(), priority=Priority.REALTIME)
        assert ids(claim(queue, "w2", saved=(8, 0)).claims) == ids(batch[:2])

    @pytest.mark.parametrize("large", [draft(rows=200), draft(tokens=5_000)])
    def test_an_over_large_suspect_is_not_left_behind(self, queue: Queue, large: Draft) -> None:
        queue.put(large)
        claims = queue.claim("dead").claims
        queue.lease.release("dead", started=names(claims), gone=True)
        queue.put(draft(), priority=Priority.REALTIME)

        assert ids(claim(queue, saved=(8, 0)).claims) == ids(claims)

    def test_a_suspect_of_which_nothing_was_noted_runs_alone(self, queue: Queue) -> None:
        batch = suspects(queue, 9)
        queue.client.delete(queue.keys.trail())

        assert ids(claim(queue).claims) == ids(batch[:1])

    def test_what_a_lost_host_held_is_the_batch(self, queue: Queue) -> None:
        held = queue.hold("h1", *[draft() for _ in range(9)])
        for lost, successor in (("h1", "h2"), ("h2", "")):
            queue.age(lost, held)
            queue.silence(lost)
            queue.passed(1000)
            assert queue.reclaim() == ("done", 9)
            if successor:
                assert len(claim(queue, successor).claims) == 9

        group = claim(queue)

        assert [each.attempts for each in group.claims] == [1.0] * 3
        assert ids(group.claims) == ids(held[:3])

    @pytest.mark.parametrize("silent", [False, True])
    def test_the_last_worker_that_lives_serves_others_until_a_second_one_is_back(
        self, queue: Queue, silent: bool
    ) -> None:
        queue.lease.beat("left", {}, [])
        batch = queue.hold("dead", *[draft() for _ in range(9)])
        if silent:
            queue.silence("dead")
        queue.lease.release("dead", started=names(batch), gone=True)
        use_realtime(queue)
        (fresh,) = queue.put(draft())

        assert ids(claim(queue, "left").claims) == [fresh.id]
        last = claim(queue, "left")
        assert (last.claims, last.suspects) == ([], 0)
        queue.lease.beat("back", {}, [])

        assert ids(claim(queue, "left").claims) == ids(batch[:3])

    def test_a_suspect_waits_for_a_second_worker_for_a_bounded_time(self, queue: Queue) -> None:
        queue.lease.beat("left", {}, [])
        (suspect,) = suspects(queue, 1)
        use_realtime(queue)
        assert claim(queue, "left").claims == []

        field = f"{suspect.address.name}:batch"
        batch, size, until = cast(bytes, queue.client.hget(queue.keys.trail(), field)).split()
        assert 29_000 < int(until) - queue.now() <= 30_000
        queue.client.hset(queue.keys.trail(), field, b" ".join([batch, size, b"1"]))

        assert ids(claim(queue, "left").claims) == ids([suspect])

    def test_a_suspect_waits_no_longer_after_the_clock_stepped_back(self, queue: Queue) -> None:
        queue.lease.beat("left", {}, [])
        (suspect,) = suspects(queue, 1)
        use_realtime(queue)
        # As if it had been noted an hour ahead of what the clock says now.
        field = f"{suspect.address.name}:batch"
        batch, size, until = cast(bytes, queue.client.hget(queue.keys.trail(), field)).split()
        queue.client.hset(queue.keys.trail(), field, b" ".join([batch, size, b"%d" % (int(until) + 3_600_000)]))

        assert ids(claim(queue, "left").claims) == ids([suspect])

    def test_the_last_worker_runs_suspects_at_once_if_nothing_more_urgent_comes(self, queue: Queue) -> None:
        queue.lease.beat("left", {}, [])
        (suspect,) = suspects(queue, 1)

        assert ids(claim(queue, "left").claims) == ids([suspect])

    def test_a_realtime_suspect_waits_for_no_second_worker(self, queue: Queue) -> None:
        queue.lease.beat("left", {}, [])
        queue.put(draft(), priority=Priority.REALTIME)
        claims = queue.claim("dead").claims
        queue.lease.release("dead", started=names(claims), gone=True)

        assert ids(claim(queue, "left").claims) == ids(claims)

    def test_a_group_that_was_given_back_unstarted_is_of_its_batch_as_before(self, queue: Queue) -> None:
        batch = suspects(queue, 9)
        group = claim(queue, "w1")
        queue.lease.release("w1", started=names(group.claims[:1]), gone=True)

        again = [claim(queue, f"w{n}").claims for n in range(2, 6)]

        assert sorted(ids(each) for each in again) == sorted(
            [ids(batch[:1]), ids(batch[1:4]), ids(batch[4:7]), ids(batch[7:])]
        )

    @pytest.mark.parametrize("how", ["settled", "cancelled", "purged", "deleted"])
    def test_what_was_noted_of_a_suspect_goes_with_it(self, queue: Queue, how: str) -> None:
        (suspect,) = suspects(queue, 1)
        assert queue.client.hlen(queue.keys.trail()) == 2

        if how == "cancelled":
            queue.streams.cancel(ids([suspect]), CALLER)
        elif how == "purged":
            queue.streams.purge()
        elif how == "deleted":
            # By a stranger; noticed as soon as anything else waits in its stream.
            queue.client.xdel(queue.keys.stream(Priority.NORMAL), suspect.address.entry)
            queue.put(draft())
            assert len(claim(queue).claims) == 1
        else:
            queue.settle(claim(queue).claims)

        assert not queue.client.exists(queue.keys.trail())
