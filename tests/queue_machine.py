"""The queue's verbs in any order, by several workers and callers, beside a model that says what must be true.

No test waits for time to pass. The lease is an hour, and whatever only time does is made so: an entry that was not
renewed, a worker that fell silent, a reclaim pass that is due.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, cast

from contracts.queue import Queue
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from queue_model import CANCELLED, MAX_IN_ALL, MAX_JOBS, Entry, Model, check_claim
from redis.client import Pipeline

from millstream.broker.contract.codec import decode_reply, encode_inputs
from millstream.broker.contract.errors import Cancelled
from millstream.broker.contract.job import PRIORITIES, Address, Claim, Draft, Priority
from millstream.broker.contract.keys import GROUP, ServiceKeys
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.lease import Lease
from millstream.broker.queue.pause import Pause, find_pause, pause, resume
from millstream.broker.queue.replies import DELETE_COUNT, Replies
from millstream.broker.queue.stream_types import Group, Settlement
from millstream.broker.transport.connection import Connection

LEASE_S = 3600.0
LEASE_MS = round(LEASE_S * 1000)
KNOWN_S = 10.0
"""So long after its end a job is surely still known by its id."""

WORKERS = ("w1", "w2", "w3")
CLIENTS = ("alice", "bob", "")
"""The last one is nobody: its jobs are detached."""

STEPS = 60
EACH = 500
"""Times that each thing happens at least in a long run."""

T = TypeVar("T")

shape = st.tuples(st.integers(1, 4), st.integers(1, 20))
"""Rows and tokens of a job."""

phase = st.sampled_from(["", "", "", "", "total", "queue"])
group = st.tuples(st.sampled_from(PRIORITIES), st.lists(shape, min_size=1, max_size=4), phase)
limit = st.builds(
    ClaimBudget,
    jobs=st.integers(1, 8),
    rows=st.integers(1, 16),
    tokens=st.integers(5, 120),
    live_workers=st.integers(1, 3),
    empty_handed=st.sampled_from([True, True, False]),
    streams=st.sampled_from([3, 3, 3, 2, 1, 0]),
    returned=st.sampled_from([3, 3, 3, 1]),
    saved=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    held=st.sampled_from([0, 0, 3]),
    next_rows=st.integers(0, 4),
    max_attempts=st.just(3),
    job=st.sampled_from([(1, 1), (4, 20)]),
    large=st.just((10**9, 10**9)),
)
worker = st.sampled_from(WORKERS)

COUNTED = (
    "accepted",
    "refused: queue_full",
    "refused: paused",
    "sent again: waiting",
    "sent again: held",
    "sent again: ended",
    "claimed: new",
    "claimed: given back",
    "claimed: suspect",
    "claimed: suspects together",
    "claimed: over-large",
    "claimed: out of savings",
    "claimed: nothing, paused",
    "claimed: past its time",
    "claim's answer lost",
    "woken",
    "woken in a pause and handed back",
    "beat: extended",
    "beat: lost",
    "beat: unknown",
    "beat: cancelled",
    "settled by its holder",
    "settled by one who lost it",
    "settled late by one who lost it",
    "settled twice",
    "buried",
    "cancelled: waiting",
    "cancelled: given back",
    "cancelled: running",
    "cancelled: gone",
    "died: an attempt",
    "died: no attempt",
    "reclaimed",
    "reclaimed: nothing, early",
    "reclaimed: nothing, after a gap",
    "reclaimed: nothing of a live worker",
    "read",
    "read again after a doubt",
    "purged",
    "resumed",
)
"""What must have happened in a long run, beside every rule."""


@dataclass
class Seen:
    """Of one client's replies, oldest first, how many it has read, and how many of those are deleted."""

    read: int = 0
    deleted: int = 0
    from_start: bool = False
    """The next read starts over: the last one found none."""


class QueueMachine(RuleBasedStateMachine):
    """Real scripts on a real server, three workers, two clients and nobody, against the model."""

    def __init__(self, connection: Connection, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts
        self.model = Model(hands={name: set() for name in WORKERS})
        keys = ServiceKeys(f"test-machine-{secrets.token_hex(6)}")
        self.queue = Queue(connection.client, keys)
        self.queue.open(MAX_JOBS[Priority.NORMAL])
        self.queue.client.hset(keys.spec(), "max_queue_batch", MAX_JOBS[Priority.BATCH])
        self.keys, self.streams = keys, self.queue.streams
        self.lease = Lease(connection.client, keys, lease_s=LEASE_S)
        self.readers = {client: Replies(connection.client, keys, client) for client in CLIENTS if client}
        self.seen = {client: Seen() for client in self.readers}
        self.answers = 0

    def teardown(self) -> None:
        """Nothing but what may stay is left without a ttl."""
        found = list(self.queue.client.scan_iter(f"ms:{{{self.keys.service}}}:*", count=1000))
        immortal = {key.decode() for key in found if self.queue.client.pttl(key) == -1}
        self.queue.client.unlink(*found)
        assert immortal <= self.allowed_without_ttl

    @property
    def allowed_without_ttl(self) -> set[str]:
        keys = self.keys
        return {*keys.streams(), keys.spec(), keys.dead(), keys.paused(), keys.bell()}

    def count(self, what: str, times: int = 1) -> None:
        self.counts[what] += times

    # -- callers -----------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.model.live()) < MAX_IN_ALL)
    @rule(groups=st.lists(group, min_size=1, max_size=3), client=st.sampled_from(CLIENTS))
    def enqueue(self, groups: list[tuple[Priority, list[tuple[int, int]], str]], client: str) -> None:
        self.count("rule: enqueue")
        self._enqueue(
            [Group(priority, [make_draft(each, client, late) for each in shapes]) for priority, shapes, late in groups],
            [late for *_, late in groups],
        )

    def _enqueue(self, sent: Sequence[Group], lates: Sequence[str]) -> None:
        admissions = self.streams.enqueue(sent)

        # A job that is refused for its tenant refuses what that tenant sends behind it in the same call.
        closed, full = set[tuple[Priority, str]](), set[Priority]()
        for late, each, admission in zip(lates, sent, admissions, strict=True):
            priority, tenant = each.priority, each.drafts[0].tenant
            refused = self.model.refusal(priority, len(each.drafts), tenant)
            if refused and (priority, tenant) in closed and priority not in full:
                refused = "tenant_full"
            if len(each.drafts) == 1 and refused == "tenant_full":
                closed.add((priority, tenant))
            if len(each.drafts) == 1 and refused == "queue_full":
                full.add(priority)
            assert admission.refused == refused
            self.count(f"refused: {refused}" if refused else "accepted")
            for draft in () if refused else each.drafts:
                self._accepted(priority, draft, late)

    def _accepted(self, priority: Priority, draft: Draft, late: str) -> None:
        entry = Entry(draft.id, priority, draft.rows, draft.tokens, draft.client, late)
        entry.name = cast(bytes, self.queue.client.get(self.keys.seen(draft.id))).decode()
        entry.tenant = draft.tenant
        self.model.add(entry)

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self.count("rule: send again")
        entry = data.draw(_one_of(list(self.model.entries.values())))
        if entry.where == "ended" and time.monotonic() - entry.ended_at > KNOWN_S:
            return
        draft = Draft(entry.job_id, "echo", entry.rows, entry.tokens, b"{}", entry.client)

        (admission,) = self.streams.enqueue([Group(data.draw(st.sampled_from(PRIORITIES)), [draft])])

        assert not admission.refused
        self.count(f"sent again: {entry.where}")

    @precondition(lambda self: self.model.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.count("rule: cancel")
        first = data.draw(_one_of([*self.model.live(), *self.model.ended()[-1:]]))
        others = [entry for entry in self.model.entries.values() if entry.client == first.client][-8:]
        wanted = [first, *data.draw(_some_of(others, 1))]

        outcomes = self.streams.cancel([entry.job_id for entry in wanted], first.client)

        for entry, outcome in zip(wanted, outcomes, strict=True):
            assert outcome == {"held": "running", "ended": "gone"}.get(entry.where, "waiting")
            self.count("cancelled: given back" if entry.where == "returned" else f"cancelled: {outcome}")
            if outcome == "running":
                entry.unwanted = True
            elif outcome == "waiting":
                self.model.end(entry, None if entry.client else CANCELLED, time.monotonic())

    @precondition(lambda self: any(self._written(client) for client in self.readers))
    @rule(data=st.data(), doubt=st.booleans())
    def read(self, data: st.DataObject, doubt: bool) -> None:
        """With a doubt: a read before it was cut off, and the stream is read from its front again."""
        self.count("rule: read")
        client = data.draw(st.sampled_from([client for client in self.readers if self._written(client)]))
        seen = self.seen[client]
        if doubt:
            self.readers[client] = Replies(self.queue.client, self.keys, client)
            self.count("read again after a doubt", times=seen.read > seen.deleted)
            seen.read, seen.from_start = seen.deleted, False
        elif seen.from_start or seen.read - seen.deleted >= DELETE_COUNT:
            seen.deleted = seen.read
        unread = self.model.replies.get(client, [])[seen.read :]

        pairs = self.readers[client].read(0.001)

        assert [(job_id, _plain(reply)) for job_id, reply, _ in pairs] == unread
        seen.read += len(unread)
        seen.from_start = not unread
        self.count("read", times=bool(unread))

    def _written(self, client: str) -> list[tuple[str, bytes]]:
        """What is in the reply stream."""
        return self.model.replies.get(client, [])[self.seen[client].deleted :]

    # -- workers -----------------------------------------------------------------------------------------------

    @precondition(lambda self: any(entry.where != "held" for entry in self.model.live()))
    @rule(consumer=worker, limit=limit, cut=st.sampled_from([False, False, True]))
    def claim(self, consumer: str, limit: ClaimBudget, cut: bool) -> None:
        """With `cut` the answer is lost on its way: the worker holds what it does not know of."""
        self.count("rule: claim")
        self._claim(consumer, limit, cut)

    def _claim(self, consumer: str, limit: ClaimBudget, cut: bool = False) -> None:
        claimed = self.streams.claim(consumer, limit)

        self._check_claimed(limit, claimed)
        self.count("claimed: nothing, paused", times=claimed.paused)
        self.count("claim's answer lost", times=cut and bool(claimed.claims))
        for claim in claimed.claims:
            entry = self.model.entries[claim.address.job_id]
            self.count("claimed: past its time", times=bool(entry.phase))
            self.count("claimed: out of savings", times=claim.by_share)
            self.count("claimed: suspect", times=entry.suspect)
            self.count("claimed: suspects together", times=entry.suspect and len(claimed.claims) > 1)
            self.count("claimed: new" if entry.where == "waiting" else "claimed: given back")
            over_large = entry.rows > limit.rows or entry.tokens > limit.tokens
            self.count("claimed: over-large", times=over_large)
            self._taken(entry, consumer, known=not cut)

    def _check_claimed(self, limit: ClaimBudget, claimed: Claimed) -> None:
        check_claim(self.model, limit, claimed)

    def _taken(self, entry: Entry, consumer: str, *, known: bool) -> None:
        self.model.hand_over(entry, consumer)
        if known:
            self.model.hands[consumer].add(entry.job_id)

    @precondition(lambda self: any(self.model.waiting(priority) for priority in PRIORITIES))
    @rule(consumer=worker)
    def wake(self, consumer: str) -> None:
        """The oldest job of each stream comes to a sleeping worker, which hands it back where the service is paused."""
        self.count("rule: wake")
        oldest = [waiting[0] for priority in PRIORITIES if (waiting := self.model.waiting(priority))]

        claims = self.streams.wait(consumer, 0.001, ClaimBudget(jobs=0, rows=0, tokens=0)).claims

        assert _ids(claims) == [entry.job_id for entry in oldest]
        for entry in oldest:
            self._taken(entry, consumer, known=not self.model.paused)
        if not self.model.paused:
            self.count("woken")
            return
        names = [claim.address.name for claim in claims]
        assert self.lease.release(consumer, only=names) == len(names)
        self.count("woken in a pause and handed back")
        for entry in oldest:
            self.model.give_back(entry, 0.0)

    @precondition(lambda self: any(self.model.hands.values()) or not self.model.beating)
    @rule(consumer=worker)
    def beat(self, consumer: str) -> None:
        self.count("rule: beat")
        hands, held, model = self.model.in_hand(consumer), self.model.held(consumer), self.model

        beat = self.lease.beat(consumer, {"state": "ready"}, [entry.name for entry in hands])

        model.beating.add(consumer)
        lost, unknown = model.lost(consumer), model.unknown(consumer)
        # A beat asks for the marks of what the worker knows it holds.
        unwanted = [entry for entry in held if entry.unwanted and entry in hands]
        assert sorted(beat.lost) == sorted(entry.name for entry in lost)
        assert sorted(beat.unknown) == sorted(entry.name for entry in unknown)
        assert sorted(beat.cancelled) == sorted(entry.name for entry in unwanted)
        assert beat.live_workers == len(model.beating) == self.lease.live_workers()
        self.count("beat: lost", times=bool(lost))
        self.count("beat: unknown", times=bool(unknown))
        self.count("beat: cancelled", times=bool(unwanted))
        self.count("beat: extended", times=any(entry.idle for entry in held))
        model.hands[consumer].difference_update(entry.job_id for entry in lost)
        for entry in held:
            entry.idle = False
        for entry in unwanted:
            entry.unwanted = False

    @precondition(lambda self: any(self.model.hands.values()))
    @rule(data=st.data(), twice=st.booleans())
    def settle(self, data: st.DataObject, twice: bool) -> None:
        """Some of what a worker believes to hold, whoever holds it by now; `twice`: each again in the same call."""
        self.count("rule: settle")
        consumer = data.draw(st.sampled_from([name for name in WORKERS if self.model.hands[name]]))
        chosen = data.draw(_some_of(self.model.in_hand(consumer), 4, least=1))
        self.count("settled by its holder", times=sum(entry in self.model.held(consumer) for entry in chosen))
        self.count("settled twice", times=twice)

        self._settle(consumer, chosen + chosen if twice else chosen)

    @precondition(lambda self: any(self.model.lost(consumer) for consumer in WORKERS))
    @rule(data=st.data())
    def settle_what_was_lost(self, data: st.DataObject) -> None:
        """A worker that was taken for dead answers all the same."""
        self.count("rule: settle what was lost")
        consumer = data.draw(st.sampled_from([name for name in WORKERS if self.model.lost(name)]))
        chosen = data.draw(_some_of(self.model.lost(consumer), 2, least=1))
        self.count("settled by one who lost it", times=sum(entry.pending for entry in chosen))
        self.count("settled late by one who lost it", times=sum(not entry.pending for entry in chosen))

        self._settle(consumer, chosen)

    @precondition(lambda self: any(entry.suspect for entry in self.model.returned()))
    @rule(consumer=worker)
    def bury(self, consumer: str) -> None:
        """A worker takes what cost others their lives, and buries it before it runs."""
        self.count("rule: bury")
        self._claim(consumer, ClaimBudget(jobs=8, rows=8, tokens=64, empty_handed=True, next_rows=8))
        exhausted = [entry for entry in self.model.held(consumer) if entry.suspect]

        if exhausted:
            self._settle(consumer, exhausted, bury="max_attempts")
        self.count("buried", times=len(exhausted))

    def _settle(self, consumer: str, entries: Sequence[Entry], bury: str = "") -> None:
        """Each is answered where anybody held it till now, and is late otherwise."""
        settlements, expected = [], []
        for entry in entries:
            self.answers += 1
            reply = f"{consumer} {self.answers}".encode()
            settlements.append(Settlement(_address(entry), reply, bury))
            expected.append("answered" if entry.pending else "late")
            if entry.pending:
                if bury:
                    self.model.letters.append((entry.job_id, bury, entry.attempts, entry.owner))
                self.model.end(entry, reply, time.monotonic())
            self.model.hands[consumer].discard(entry.job_id)
        assert self.streams.settle(settlements) == expected

    @precondition(lambda self: self._holders())
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A supervisor gives back what its dead child held: an attempt more for what ran, nothing for the rest."""
        self.count("rule: die")
        consumer = data.draw(st.sampled_from(self._holders()))
        held = self.model.held(consumer)
        started = data.draw(_some_of(held, 4))

        assert self.lease.release(consumer, started=[e.name for e in started], gone=True) == len(held)

        self.model.die(started, consumer, 1.0)
        self.model.beating.discard(consumer)
        for entry in held:
            if entry not in started:
                self.model.give_back(entry, 0.0)
            self.count("died: an attempt" if entry in started else "died: no attempt")

    @precondition(lambda self: any(self.model.unknown(consumer) for consumer in WORKERS))
    @rule(data=st.data())
    def give_back_unknown(self, data: st.DataObject) -> None:
        """What its beats name that it does not know."""
        self.count("rule: give back unknown")
        consumer = data.draw(st.sampled_from([name for name in WORKERS if self.model.unknown(name)]))
        hands, unknown = self.model.in_hand(consumer), self.model.unknown(consumer)

        assert self.lease.release(consumer, keep=[entry.name for entry in hands]) == len(unknown)

        for entry in unknown:
            self.model.give_back(entry, 0.0)

    # -- hosts and operators -----------------------------------------------------------------------------------

    @precondition(lambda self: self._holders())
    @rule(data=st.data(), silent=st.booleans())
    def renew_nothing(self, data: st.DataObject, silent: bool) -> None:
        self.count("rule: renew nothing")
        self._let_a_lease_pass(data, silent)

    def _let_a_lease_pass(self, data: st.DataObject, silent: bool) -> None:
        """Without a renewal of some entries. A host that is lost is silent, too; a slow worker goes on beating."""
        consumer = data.draw(st.sampled_from(self._holders()))
        if not silent:
            self.beat(consumer)
        for entry in data.draw(_some_of(self.model.held(consumer), 4, least=1)):
            stream, entry_id = self.keys.stream(entry.priority), entry.name.partition(":")[2]
            self.queue.client.xclaim(stream, GROUP, consumer, 0, [entry_id], idle=2 * LEASE_MS, justid=True)
            entry.idle = True
        if silent and consumer in self.model.beating:
            self.queue.client.zadd(self.keys.workers(), {consumer: self.queue.now() - 2 * LEASE_MS})
            self.model.beating.discard(consumer)

    def _holders(self) -> list[str]:
        return [consumer for consumer in WORKERS if self.model.held(consumer)]

    @precondition(lambda self: self._holders())
    @rule(data=st.data(), silent=st.booleans(), when=st.sampled_from(["due", "due", "due", "early", "after a gap"]))
    def reclaim(self, data: st.DataObject, silent: bool, when: str) -> None:
        self.count("rule: reclaim")
        self._let_a_lease_pass(data, silent)
        self.queue.passed({"due": 1_000, "early": 0, "after a gap": LEASE_MS}[when])
        before, _ = self.queue.last_pass()
        held = [entry for entry in self.model.live() if entry.where == "held" and entry.idle]
        lost = [entry for entry in held if entry.holder not in self.model.beating]

        returned = self.lease.reclaim()

        if when == "early" and self.queue.last_pass()[0] != before:
            # The machine took a second over it: no longer early.
            when = "due"
        if when != "due":
            assert returned == 0
            self.count(f"reclaimed: nothing, {when}")
            return
        assert returned == len(lost)
        self.count("reclaimed", times=bool(lost))
        self.count("reclaimed: nothing of a live worker", times=len(held) > len(lost))
        for consumer, priority in {(entry.holder, entry.priority) for entry in lost}:
            batch = [entry for entry in lost if (entry.holder, entry.priority) == (consumer, priority)]
            self.model.die(batch, consumer, 0.5)

    @precondition(lambda self: self.model.paused or len(self.model.live()) > 2)
    @rule(how=st.sampled_from(["", "", "", "", "accepting", "refusing"]))
    def pause_or_resume(self, how: Literal["", "accepting", "refusing"]) -> None:
        self.count("rule: pause or resume")
        if how:
            pause(self.queue.client, self.keys, refusing=how == "refusing")
        else:
            assert resume(self.queue.client, self.keys) == bool(self.model.paused)
            self.count("resumed", times=bool(self.model.paused))
        self.model.paused = how
        assert find_pause(self.queue.client, self.keys) == (Pause(refusing=how == "refusing") if how else None)

    @precondition(lambda self: len(self.model.live()) > MAX_IN_ALL * 3 // 4)
    @rule()
    def purge(self) -> None:
        self.count("rule: purge")
        waiting = [e for priority in PRIORITIES for e in self.model.live(priority) if e.where != "held"]

        assert self.streams.purge() == len(waiting)

        self.count("purged", times=bool(waiting))
        for entry in waiting:
            given_up = entry.client and entry.phase == "total"
            self.model.end(entry, None if given_up else CANCELLED, time.monotonic())

    # -- what is true after every step -------------------------------------------------------------------------

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        """Waiting, or on one consumer's name with its deliveries; what is settled is nowhere."""
        pipe = self.queue.client.pipeline(transaction=False)
        for stream in self.keys.streams():
            pipe.xrange(stream)
            pipe.xpending_range(stream, GROUP, "-", "+", 1000)
        found = pipe.execute()
        for priority, entries, pending in zip(PRIORITIES, found[::2], found[1::2], strict=True):
            live = self.model.live(priority)
            assert [fields[b"id"].decode() for _, fields in entries] == [entry.job_id for entry in live]
            number = PRIORITIES.index(priority) + 1
            owners = {
                f"{number}:{p['message_id'].decode()}": (p["consumer"].decode(), p["times_delivered"]) for p in pending
            }
            assert owners == {e.name: (e.owner, 1 + 2 * e.attempts) for e in live if e.pending}

    @invariant()
    def every_settled_job_has_one_reply_and_no_other_has_any(self) -> None:
        for client in self.readers:
            written = [(job_id, _plain(reply)) for job_id, reply in self.queue.replies(client)]
            assert written == self._written(client)
        detached = [entry.job_id for entry in self.model.entries.values() if not entry.client]
        pipe: Pipeline = self.queue.client.pipeline(transaction=False)
        for job_id in detached:
            pipe.get(self.keys.result(job_id))
        results = dict(self.model.replies.get("", []))
        assert [_plain(each) if each else None for each in pipe.execute()] == [results.get(each) for each in detached]

    @invariant()
    def every_buried_job_is_among_the_dead_letters_as_it_was(self) -> None:
        letters = [
            (each[b"id"].decode(), each[b"reason"].decode(), float(each[b"attempts"]), each[b"consumer"].decode())
            for each in self.queue.dead_letters()
        ]
        assert letters == self.model.letters

    @invariant()
    def every_job_is_counted_once(self) -> None:
        """When it is accepted, and when it ends: settled, cancelled or purged; and with all of its rows."""
        totals = self.queue.totals()
        accepted, ended = list(self.model.entries.values()), self.model.ended()
        for priority in PRIORITIES:
            rows = [entry.rows for entry in accepted if entry.priority == priority]
            assert (totals.jobs[priority], totals.rows[priority]) == (len(rows), sum(rows))
        assert totals.settled == len(ended)
        assert totals.ok + sum(totals.failed.values()) == sum(entry.rows for entry in ended)
        assert sum(totals.buried.values()) == len(self.model.letters)


def make_draft(shape: tuple[int, int], client: str, late: str) -> Draft:
    rows, tokens = shape
    past = time.monotonic() - 1.0
    return Draft(
        secrets.token_hex(16),
        "echo",
        rows,
        tokens,
        encode_inputs(["x"] * rows, {}),
        client,
        deadline=past if late == "total" else None,
        queue_by=past if late == "queue" else None,
    )


def _address(entry: Entry) -> Address:
    return Address(entry.name, entry.job_id, entry.client, rows=entry.rows)


def _plain(reply: bytes) -> bytes:
    """Our own replies as they are, the queue's own as CANCELLED."""
    if not reply.startswith(b"{"):
        return reply
    assert isinstance(decode_reply(reply).error, Cancelled)
    return CANCELLED


def _ids(claims: Sequence[Claim]) -> list[str]:
    return [claim.address.job_id for claim in claims]


def _one_of(choices: Sequence[T]) -> st.SearchStrategy[T]:
    return st.integers(0, len(choices) - 1).map(lambda at: choices[at])


def _some_of(choices: Sequence[T], most: int, *, least: int = 0) -> st.SearchStrategy[list[T]]:
    """Different ones, in any order."""
    if not choices:
        return st.just([])
    places = st.lists(st.integers(0, len(choices) - 1), min_size=least, max_size=most, unique=True)
    return places.map(lambda chosen: [choices[at] for at in chosen])


def run(
    connection: Connection,
    examples: int,
    counts: Counter[str],
    phases: Sequence[Phase] = tuple(Phase),
    machine: type[QueueMachine] = QueueMachine,
) -> None:
    """So many examples; what happened in them is added to `counts`."""
    how = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=phases,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    hz = str(connection.client.config_get("hz")["hz"])
    # How often an idle server looks whose blocking read is over.
    connection.client.config_set("hz", 500)
    try:
        # Any callable that makes a machine will do, whatever the stub says.
        made = cast(type[QueueMachine], partial(machine, connection, counts))
        run_state_machine_as_test(made, settings=how)
    finally:
        connection.client.config_set("hz", hz)


def run_short_or_long(
    connection: Connection, examples: int, long_examples: int, counted: Sequence[str], machine: type[QueueMachine]
) -> None:
    """A long run if MILLSTREAM_LONG is 1: it prints how often each thing happened, and fails if one was rare."""
    if os.environ.get("MILLSTREAM_LONG") != "1":
        run(connection, examples, Counter(), (Phase.reuse, Phase.generate), machine)
        return

    counts: Counter[str] = Counter()
    try:
        run(connection, long_examples, counts, machine=machine)
    finally:
        # Also where it was interrupted: what was reached till then is worth knowing.
        for what, times in sorted(counts.items()):
            print(f"{times:8,}  {what}")  # noqa: T201 - the statistics are what the long run is for
    seldom = {what: counts[what] for what in [*counted, *(each for each in counts if each.startswith("rule:"))]}
    assert {what: times for what, times in seldom.items() if times < EACH} == {}
