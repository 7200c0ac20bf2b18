"""The state machine of the queue's verbs, for a service with `fair`: jobs of several tenants, and of older clients.

The suite makes a short run. The long one makes 10,000 examples:

    MILLSTREAM_LONG=1 .venv/bin/pytest tests/integration/test_fair_machine.py -s
"""

from __future__ import annotations

import secrets
from collections import Counter
from copy import deepcopy
from typing import cast

import pytest
from fair_model import Shares
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from queue_machine import CLIENTS, QueueMachine, group, make_draft, run_short_or_long, worker
from queue_model import MAX_IN_ALL, Entry
from redis.typing import EncodableT, FieldT

from millstream.broker.contract.job import PRIORITIES, Draft, Priority
from millstream.broker.queue.claims import ClaimBudget, Claimed
from millstream.broker.queue.stream_types import Group
from millstream.broker.transport.connection import Connection

TENANTS = ("a", "b", "c", "")
WEIGHTS = {"a": 1.0, "b": 3.0}
MOST_OF_TENANT = 4

EXAMPLES, LONG_EXAMPLES = 80, 10_000

COUNTED = (
    "refused: tenant_full",
    "claimed: another tenant's older job waits",
    "parked",
    "indexed: of an older client",
    "cancelled: waiting",
)
"""What must have happened in a long run, beside every rule."""


class FairMachine(QueueMachine):
    """The model's order of jobs that wait is that of `Shares`."""

    def __init__(self, connection: Connection, counts: Counter[str]) -> None:
        super().__init__(connection, counts)
        fields: dict[FieldT, EncodableT] = {
            "fair": "tenant",
            "fair_weights": len(WEIGHTS),
            "max_queue_tenant": MOST_OF_TENANT,
        }
        fields |= {f"weight:{tenant}": weight for tenant, weight in WEIGHTS.items()}
        self.queue.client.hset(self.keys.spec(), mapping=fields)
        in_flight = Counter[str]()
        self.model.shares = {each: Shares(WEIGHTS, in_flight=in_flight) for each in PRIORITIES}
        self.model.most_of_tenant = MOST_OF_TENANT
        self.most_in_flight: int | None = None
        self.unindexed: list[Entry] = []
        """Entries of older clients that are not in the index."""

    @initialize(most=st.sampled_from([None, 2, 4]))
    def limit_in_flight(self, most: int | None) -> None:
        self.count("rule: limit in flight", times=most is not None)
        self.most_in_flight = most
        if most:
            self.queue.client.hset(self.keys.spec(), "max_in_flight", most)
            for shares in self.model.shares.values():
                shares.most = most

    @property
    def allowed_without_ttl(self) -> set[str]:
        return super().allowed_without_ttl | {
            key(priority) for key in (self.keys.index, self.keys.turn, self.keys.parked) for priority in PRIORITIES
        }

    @precondition(lambda self: len(self.model.live()) < MAX_IN_ALL)
    @rule(
        groups=st.lists(st.tuples(group, st.sampled_from(TENANTS)), min_size=1, max_size=3),
        client=st.sampled_from(CLIENTS),
    )
    def enqueue(self, groups: list[tuple[tuple[Priority, list[tuple[int, int]], str], str]], client: str) -> None:
        self.count("rule: enqueue")
        sent = [
            Group(priority, [make_draft(each, client, late)._replace(tenant=tenant) for each in shapes])
            for (priority, shapes, late), tenant in groups
        ]
        self._enqueue(sent, [late for (*_, late), _ in groups])

    @precondition(lambda self: len(self.model.live()) < MAX_IN_ALL)
    @rule(
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(TENANTS),
        tokens=st.integers(1, 20),
    )
    def add_unindexed(self, priority: Priority, tenant: str, tokens: int) -> None:
        """As an older client does, or redis-cli: the entry is in no index until a claim finds it."""
        self.count("rule: add unindexed")
        draft = Draft(secrets.token_hex(16), "echo", 1, tokens, b'{"inputs": ["x"]}', "alice", tenant=tenant)
        entry = Entry(draft.id, priority, 1, tokens, "alice", "", tenant=tenant)
        fields: dict[FieldT, EncodableT] = {"v": 1, "id": draft.id, "at": self.queue.now(), "op": "echo", "rows": 1}
        fields |= {"tokens": tokens, "client": "alice"}
        if tenant:
            fields["tenant"] = tenant
        fields["body"] = draft.body
        name = cast(bytes, self.queue.client.xadd(self.keys.stream(priority), fields)).decode()
        entry.name = f"{PRIORITIES.index(priority) + 1}:{name}"
        self.queue.client.set(self.keys.seen(draft.id), entry.name, px=3_600_000)
        self.queue.client.hincrby(self.keys.metrics(), f"jobs:{priority}", 1)
        self.queue.client.expire(self.keys.metrics(), 3_600)
        self.model.entries[draft.id] = entry
        self.unindexed.append(entry)

    @rule(consumer=worker)
    def wake(self, consumer: str) -> None:
        """The streams wake nobody: a worker sleeps by the bell."""
        self.count("rule: wake")

        claimed = self.streams.wait(consumer, 0.001, ClaimBudget(jobs=0, rows=0, tokens=0))

        self._note_indexed(claimed)
        assert claimed.claims == []

    def _note_indexed(self, claimed: Claimed) -> None:
        """Entries of older clients come into the index with a claim, before it takes any."""
        found = {claim.address.job_id for claim in claimed.claims}
        for entry in list(self.unindexed):
            if entry.where == "ended":
                self.unindexed.remove(entry)
            elif entry.job_id in found or self._is_indexed(entry):
                shares = self.model.shares[entry.priority]
                shares.add(entry.tenant, (entry.job_id, entry.tokens))
                shares.waiting[entry.tenant].sort(key=lambda job: member(self.model.entries[job[0]]))
                self.unindexed.remove(entry)
                self.count("indexed: of an older client")

    def _is_indexed(self, entry: Entry) -> bool:
        return self.queue.client.zscore(self.keys.index(entry.priority), member(entry)) is not None

    def _check_claimed(self, limit: ClaimBudget, claimed: Claimed) -> None:
        self._note_indexed(claimed)
        model, shares = self.model, deepcopy(self.model.shares)
        taken = [entry for claim in claimed.claims if (entry := model.entries[claim.address.job_id]).where == "waiting"]
        # One after the other: what a tenant has in flight counts for all priorities.
        for entry in taken:
            assert shares[entry.priority].take() == entry.job_id, "not its turn"
        standing, model.shares = model.shares, shares
        model.taken = {priority: [entry for entry in taken if entry.priority == priority] for priority in PRIORITIES}
        super()._check_claimed(limit, claimed)
        model.shares, model.taken = standing, {}
        for claim in claimed.claims:
            entry = self.model.entries[claim.address.job_id]
            older = [e for e in self.model.live(entry.priority) if e.where == "waiting" and e.name < entry.name]
            self.count("claimed: another tenant's older job waits", times=bool(older))

    @invariant()
    def the_index_and_what_is_held_are_the_stream(self) -> None:
        for priority in PRIORITIES:
            members = self.queue.client.zrange(self.keys.index(priority), 0, -1)
            waiting = [e for e in self.model.live(priority) if e.where == "waiting" and e not in self.unindexed]
            assert sorted(members) == sorted(map(member, waiting))

    @invariant()
    def what_is_in_flight_is_noted_with_its_tenant(self) -> None:
        pending = [entry for entry in self.model.live() if entry.pending and self.most_in_flight]
        held = {entry.name: entry.tenant for entry in pending}
        found = cast(dict[bytes, bytes], self.queue.client.hgetall(self.keys.tenants()))
        members = cast(list[bytes], self.queue.client.zrange(self.keys.in_flight(), 0, -1))
        assert {name.decode(): tenant.decode() for name, tenant in found.items()} == held
        assert sorted(members) == sorted(f"{tenant}\0{name}".encode() for name, tenant in held.items())

    @invariant()
    def each_tenant_that_waits_has_its_turn(self) -> None:
        for priority in PRIORITIES:
            shares, turn = self.model.shares[priority], self.keys.turn(priority)
            found = cast(list[tuple[bytes, float]], self.queue.client.zrange(turn, 0, -1, withscores=True))
            times = {tenant.decode(): time for tenant, time in found}
            stopped = cast(list[bytes], self.queue.client.zrange(self.keys.parked(priority), 0, -1))
            parked = {each.decode() for each in stopped}
            assert parked.isdisjoint(times)
            self.count("parked", times=bool(parked))
            assert {each for each in parked if shares.in_flight[each] < shares.most} == set()
            waiting = [tenant for tenant, jobs in shares.waiting.items() if jobs and tenant not in parked]
            assert {each: times.get(each) for each in waiting} == {each: shares.turn[each] for each in waiting}


def member(entry: Entry) -> bytes:
    ms, _, seq = entry.name.partition(":")[2].partition("-")
    return f"{entry.tenant}\0{ms:>013}-{seq:>010}".encode()


@pytest.mark.timeout(7_200)
def test_jobs_are_taken_in_the_order_of_fair_shares_whatever_happens(connection: Connection) -> None:
    run_short_or_long(connection, EXAMPLES, LONG_EXAMPLES, COUNTED, FairMachine)
