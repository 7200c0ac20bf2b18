"""What dead letters promise, on any server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from contracts.queue import Queue, draft, names

from millstream.broker.contract.codec import encode_inputs
from millstream.broker.contract.errors import InvalidRequest, QueueFull, ServicePaused
from millstream.broker.contract.job import Draft, Priority
from millstream.broker.queue.deadletters import DeadLetters, Letter
from millstream.broker.queue.pause import pause


def letters(queue: Queue) -> DeadLetters:
    return DeadLetters(queue.client, queue.keys)


def buried(queue: Queue, *drafts: Draft, reason: str = "max_attempts") -> list[Letter]:
    """The letters of these jobs, in their order."""
    for each in drafts:
        queue.settle(queue.hold("w1", each), bury=reason)
    return letters(queue).page(len(drafts))[::-1]


class DeadLettersContract:
    """A subclass gives the fixture `queue`."""

    def test_a_letter_says_what_the_job_was_and_what_became_of_it(self, queue: Queue) -> None:
        job = draft(rows=2, tenant="acme")
        running = queue.hold("first", job)
        queue.lease.release("first", started=names(running), gone=True)
        (claim,) = queue.claim("second").claims
        ((_, fields),) = queue.jobs()

        queue.settle([claim], bury="max_attempts")

        (letter,) = letters(queue).page()
        assert (letter.reason, letter.entry, letter.priority) == ("max_attempts", claim.address.entry, Priority.NORMAL)
        assert (letter.attempts, letter.consumer, letter.fields) == (1.0, "second", fields)
        assert letter.buried_at is not None
        assert abs(queue.now() - letter.buried_at) < 60_000

    def test_a_letter_tells_how_each_of_its_starts_ended(self, queue: Queue) -> None:
        running = queue.hold("first", draft())
        queue.lease.release("first", started=names(running), gone=True, how="was killed by\nSIGSEGV")
        (claim,) = queue.claim("second").claims
        queue.lease.release("second", started=names([claim]), gone=True, how="exited with status 1")
        (claim,) = queue.claim("third").claims

        queue.settle([claim], bury="max_attempts")

        (letter,) = letters(queue).page()
        told = [line.split(" ", 2) for line in letter.history]
        assert [words[1:] for words in told] == [
            ["first", "was killed by SIGSEGV"],
            ["second", "exited with status 1"],
        ]
        assert all(abs(queue.now() - int(words[0])) < 60_000 for words in told)

    def test_a_letter_tells_of_each_host_that_was_lost_with_it(self, queue: Queue) -> None:
        queue.passed(1_000)
        held = queue.hold("far", draft())
        queue.age("far", held)
        queue.silence("far")
        assert queue.reclaim() == ("done", 1)

        queue.settle(queue.claim("near").claims, bury="malformed")

        (letter,) = letters(queue).page()
        assert [line.split(" ", 1)[1] for line in letter.history] == ["far was lost with its host"]

    def test_neighbours_that_did_not_run_have_no_history(self, queue: Queue) -> None:
        running, waiting = queue.hold("first", draft(), draft())
        queue.lease.release("first", started=names([running]), gone=True)
        queue.settle(queue.claim("second", empty_handed=False).claims, bury="malformed")

        (letter,) = letters(queue).page()
        assert (letter.entry, letter.history) == (waiting.address.entry, [])

    @pytest.mark.parametrize("bury", ["", "max_attempts"])
    def test_what_was_noted_of_a_job_goes_with_it(self, queue: Queue, bury: str) -> None:
        running = queue.hold("first", draft())
        queue.lease.release("first", started=names(running), gone=True)
        assert 0 < queue.client.ttl(queue.keys.trail()) <= 86_400

        queue.settle(queue.claim("second").claims, bury=bury)

        assert not queue.client.exists(queue.keys.trail())

    def test_the_newest_come_first_a_page_at_a_time(self, queue: Queue) -> None:
        made = buried(queue, *[draft() for _ in range(5)])
        dead = letters(queue)

        first = dead.page(2)
        second = dead.page(2, before=first[-1].id)
        third = dead.page(2, before=second[-1].id)

        assert [*first, *second, *third] == made[::-1]
        assert dead.page(2, before=third[-1].id) == []
        assert (list(dead), len(dead)) == (made[::-1], 5)

    def test_all_of_many_are_iterated_over_once(self, queue: Queue) -> None:
        for _ in range(3):
            queue.put(*[draft() for _ in range(80)])
            queue.settle(queue.claim().claims, bury="poison")

        found = [letter.id for letter in letters(queue)]

        assert (len(found), len(set(found))) == (240, 240)

    def test_one_is_found_by_its_id(self, queue: Queue) -> None:
        first, second = buried(queue, draft(), draft())

        assert letters(queue).find(first.id) == first
        assert letters(queue).find(second.id) == second

    @pytest.mark.parametrize("wrong", ["1-1", "nonsense", "-", "1", "99999999999999999999-0", ""])
    def test_an_id_that_is_none_is_named(self, queue: Queue, wrong: str) -> None:
        with pytest.raises(InvalidRequest, match="dead letter"):
            letters(queue).find(wrong)

    def test_a_requeued_letter_is_a_detached_job_with_a_new_id_and_no_deadline(self, queue: Queue) -> None:
        job = draft(rows=2, tokens=7, tenant="acme", deadline=None)
        queue.put(job, priority=Priority.BATCH)
        queue.settle(queue.claim().claims, bury="max_attempts")
        (letter,) = letters(queue).page()

        job_id = letters(queue).requeue(letter)

        (claim,) = queue.claim().claims
        again = claim.job
        assert again is not None
        assert (claim.address.priority, claim.attempts, again.client) == (Priority.BATCH, 0.0, "")
        assert again.id == job_id != job.id
        assert (again.op, again.rows, again.tokens, again.body, again.tenant) == ("echo", 2, 7, job.body, "acme")
        assert (again.deadline, again.queue_by) == (0, 0)
        assert len(letters(queue)) == 0
        queue.settle([claim], b"answer")
        assert queue.streams.results(job_id, [job_id]) == [b"answer"]

    def test_a_letter_that_was_not_accepted_stays(self, queue: Queue) -> None:
        (letter,) = buried(queue, draft())
        queue.open(max_queue_size=1)
        queue.put(draft())

        with pytest.raises(QueueFull):
            letters(queue).requeue(letter)
        assert letters(queue).page() == [letter]
        pause(queue.client, queue.keys, refusing=True)
        with pytest.raises(ServicePaused):
            letters(queue).requeue(letter)
        assert letters(queue).page() == [letter]

    def test_requeueing_again_what_was_accepted_makes_no_second_job(self, queue: Queue) -> None:
        one, other = buried(queue, draft(), draft())

        job_ids = [letters(queue).requeue(each) for each in (one, one, other)]

        assert job_ids[0] == job_ids[1] != job_ids[2]
        assert queue.depth() == 2

    def test_what_is_malformed_is_never_run_again_and_stays(self, queue: Queue) -> None:
        queue.put_raw({b"hello": b"world"})
        lying = draft(rows=1)
        queue.put(Draft(lying.id, "echo", 7, 3, lying.body))
        queue.settle(queue.claim().claims, bury="malformed")

        for letter in letters(queue):
            with pytest.raises(InvalidRequest, match="malformed"):
                letters(queue).requeue(letter)

        assert (len(letters(queue)), queue.depth()) == (2, 0)

    def test_an_entry_cannot_pass_its_own_fields_for_ours(self, queue: Queue) -> None:
        queue.put_raw({b"reason": b"none", b"buried": b"soon", b"consumer": b"me", b"body": b"\xff"})

        queue.settle(queue.claim("w1").claims, bury="malformed")

        (letter,) = letters(queue).page()
        assert (letter.reason, letter.consumer) == ("malformed", "w1")
        assert letter.fields[b"entry.reason"] == b"none"
        assert letter.fields[b"body"] == b"\xff"

    def test_a_letter_keeps_a_megabyte_of_its_entry_and_says_how_much_is_cut(self, queue: Queue) -> None:
        queue.put_raw({b"id": b"i" * 1000, b"body": b"b" * 2**20, b"more": b"m" * 2**20})

        queue.settle(queue.claim("w1").claims, bury="malformed")

        ((_, letter),) = queue.entries(queue.keys.dead())
        kept = 2**20 - len(b"id") - 1000 - len(b"body")
        assert (letter[b"id"], len(letter[b"body"]), letter[b""]) == (b"i" * 1000, kept, b"")
        assert int(letter[b"cut"]) == 2 * 2**20 - kept + len(b"more")
        with pytest.raises(InvalidRequest, match="malformed"):
            letters(queue).requeue(letters(queue).page()[0])

    def test_what_a_newer_client_added_is_kept_in_the_letter_and_does_not_keep_it_from_running(
        self, queue: Queue
    ) -> None:
        (job,) = queue.put(draft())
        ((entry, fields),) = queue.jobs()
        queue.client.xdel(queue.keys.stream(Priority.NORMAL), entry)
        queue.put_raw({**fields, b"affinity": b"gpu0"})
        queue.client.set(queue.keys.seen(job.id), f"2:{queue.jobs()[0][0]}", px=60_000)
        queue.settle(queue.claim().claims, bury="max_attempts")
        (letter,) = letters(queue).page()

        letters(queue).requeue(letter)

        assert letter.fields[b"affinity"] == b"gpu0"
        (again,) = queue.claim().claims
        assert again.job is not None
        assert again.job.body == job.body

    def test_a_letter_that_was_cut_within_an_optional_field_is_not_run_as_if_it_were_whole(self, queue: Queue) -> None:
        queue.put(draft())
        ((_, fields),) = queue.jobs()
        added = {f"new{at}".encode(): b"" for at in range(30)}
        queue.put_raw({**fields, **added})
        queue.settle(queue.claim().claims[1:], bury="malformed")
        (letter,) = letters(queue).page()
        whole = {name: value for name, value in letter.fields.items() if not name.startswith(b"new")}

        with pytest.raises(InvalidRequest, match="all of its entry"):
            letters(queue).requeue(replace(letter, fields={b"cut": b"7", **whole}))

    def test_a_letter_of_an_ordinary_job_is_whole(self, queue: Queue) -> None:
        whole = Draft(draft().id, "echo", 1, 3, encode_inputs(["a" * (2**20 - 1000)], {}))

        (letter,) = buried(queue, whole)

        assert (b"cut" in letter.fields, letter.fields[b"body"]) == (False, whole.body)

    def test_a_letter_that_somebody_else_wrote_is_shown_all_the_same(self, queue: Queue) -> None:
        queue.client.xadd(
            queue.keys.dead(), {"buried": "x", "attempts": "nan", "priority": "urgent", "reason": b"\xff"}
        )

        (letter,) = letters(queue).page()

        assert (letter.buried_at, letter.attempts, letter.consumer, letter.reason) == (None, None, None, "\\xff")
        with pytest.raises(InvalidRequest, match="malformed"):
            letters(queue).requeue(letter)

    def test_letters_are_removed_one_by_one_or_all_at_once(self, queue: Queue) -> None:
        made = buried(queue, *[draft() for _ in range(4)])
        dead = letters(queue)

        assert dead.remove([made[0].id, "1-1"]) == 1
        assert list(dead) == made[:0:-1]
        assert dead.purge() == 3
        assert (list(dead), len(dead), dead.purge()) == ([], 0, 0)
