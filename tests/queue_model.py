"""What a queue must hold after each verb, in plain Python: the model that the state machine runs beside a server."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from fair_model import Shares

from millstream.broker.contract.job import PRIORITIES, Claim, Priority
from millstream.broker.contract.keys import RETURNED
from millstream.broker.queue.claims import ClaimBudget, Claimed

MAX_JOBS: Mapping[Priority, int] = {Priority.REALTIME: 6, Priority.NORMAL: 6, Priority.BATCH: 4}
"""Most jobs of each priority. Only batch has a limit of its own."""

MAX_IN_ALL = sum(MAX_JOBS.values())
"""Most jobs of all priorities together."""

CANCELLED = b"cancelled"
"""Stands for the reply that a purge writes, and for the result that the cancellation of a detached job writes."""

SUSPECT = 1.0
"""Attempts from which on a job runs in a group of suspects alone."""


@dataclass(eq=False)
class Entry:
    """One accepted job. `phase` is the limit that had passed when it was sent; `idle`: not renewed for a lease.

    `batch`: that in which it ran when its worker died, of `batch_size` jobs; `waits`: others lived then.
    """

    job_id: str
    priority: Priority
    rows: int
    tokens: int
    client: str
    phase: str
    name: str = ""
    where: Literal["waiting", "held", "returned", "ended"] = "waiting"
    holder: str = ""
    attempts: float = 0.0
    idle: bool = False
    batch: str = ""
    batch_size: int = 1
    waits: bool = False
    unwanted: bool = False
    ended_at: float = 0.0
    tenant: str = ""

    @property
    def pending(self) -> bool:
        return self.where in ("held", "returned")

    @property
    def owner(self) -> str:
        return self.holder if self.where == "held" else RETURNED

    @property
    def suspect(self) -> bool:
        return self.attempts >= SUSPECT


@dataclass
class Model:
    """All jobs ever accepted, oldest first, and what their callers and the operator must find.

    `hands` is what each worker believes to hold, which may be more or less than it does. `letters` are (job, reason,
    attempts, consumer); replies to a client and results of detached jobs are (job, reply) in the order written.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    hands: dict[str, set[str]] = field(default_factory=dict)
    beating: set[str] = field(default_factory=set)
    replies: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    letters: list[tuple[str, str, float, str]] = field(default_factory=list)
    paused: Literal["", "accepting", "refusing"] = ""
    deaths: int = 0
    in_use: set[Priority] = field(default_factory=set)
    """Priorities of which a new job was delivered."""
    shares: dict[Priority, Shares] = field(default_factory=dict)
    """Of a service with `fair`, whose jobs that wait are taken in their order; otherwise empty."""
    most_of_tenant: int = MAX_IN_ALL
    taken: dict[Priority, list[Entry]] = field(default_factory=dict)
    """While a claim is checked: what it took of those that waited, in order."""

    def live(self, priority: Priority | None = None) -> list[Entry]:
        """Accepted and not settled."""
        return [e for e in self.entries.values() if e.where != "ended" and priority in (None, e.priority)]

    def waiting(self, priority: Priority) -> list[Entry]:
        """In the order in which they are taken."""
        waiting = [entry for entry in self.live(priority) if entry.where == "waiting"]
        able = self.able(priority)
        return able + [entry for entry in waiting if entry not in able]

    def able(self, priority: Priority) -> list[Entry]:
        """Those that wait and may be taken now."""
        waiting = [entry for entry in self.live(priority) if entry.where == "waiting"]
        if not self.shares:
            return waiting
        taken = self.taken.get(priority, [])
        order = [self.entries[job_id] for job_id in self.shares[priority].order()]
        unknown = [
            e
            for e in waiting
            if all((e.job_id, e.tokens) not in jobs for jobs in self.shares[priority].waiting.values())
        ]
        return taken + [entry for entry in [*order, *unknown] if entry not in taken]

    def add(self, entry: Entry) -> None:
        """The job is accepted."""
        self.entries[entry.job_id] = entry
        if self.shares:
            self.shares[entry.priority].add(entry.tenant, (entry.job_id, entry.tokens))

    def returned(self, priorities: Collection[Priority] = PRIORITIES) -> list[Entry]:
        return [entry for entry in self.live() if entry.where == "returned" and entry.priority in priorities]

    def held(self, consumer: str) -> list[Entry]:
        return [entry for entry in self.live() if entry.where == "held" and entry.holder == consumer]

    def ended(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.where == "ended"]

    def in_hand(self, consumer: str) -> list[Entry]:
        """What `consumer` believes to hold."""
        return [entry for entry in self.entries.values() if entry.job_id in self.hands[consumer]]

    def lost(self, consumer: str) -> list[Entry]:
        """What `consumer` believes to hold and does not."""
        return [entry for entry in self.in_hand(consumer) if entry not in self.held(consumer)]

    def unknown(self, consumer: str) -> list[Entry]:
        """What `consumer` holds without knowing."""
        return [entry for entry in self.held(consumer) if entry.job_id not in self.hands[consumer]]

    def refusal(self, priority: Priority, jobs: int, tenant: str = "") -> str:
        """Why so many new jobs are turned away; empty where they are accepted."""
        if self.paused == "refusing":
            return "paused"
        if len(self.live(priority)) + jobs > MAX_JOBS[priority]:
            return "queue_full"
        own = self.shares[priority].waiting.get(tenant, ()) if self.shares else ()
        return "tenant_full" if len(own) + jobs > self.most_of_tenant else ""

    def hand_over(self, entry: Entry, consumer: str) -> None:
        if entry.where == "waiting":
            self.in_use.add(entry.priority)
            if self.shares:
                assert self.shares[entry.priority].take() == entry.job_id
        entry.where, entry.holder, entry.idle = "held", consumer, False

    def give_back(self, entry: Entry, attempts: float) -> None:
        entry.where, entry.idle = "returned", False
        entry.attempts += attempts

    def die(self, entries: Sequence[Entry], consumer: str, attempts: float) -> None:
        """Give back what `consumer` ran, or held with its host; it beats no more."""
        self.deaths += 1
        for entry in entries:
            self.give_back(entry, attempts)
            entry.batch, entry.batch_size = f"{consumer} {self.deaths}", len(entries)
            entry.waits = bool(self.beating - {consumer})

    def may_run(self, entry: Entry, taken: Sequence[Entry] = ()) -> bool:
        """Whether a suspect is given out at all, once `taken` are: else it waits for a second live worker."""
        in_use = self.in_use | {each.priority for each in taken if each.where == "waiting"}
        urgent = set(PRIORITIES[: PRIORITIES.index(entry.priority)]) & in_use
        return len(self.beating) >= 2 or not entry.waits or not urgent

    def end(self, entry: Entry, reply: bytes | None, now: float) -> None:
        """The job is over; `reply` is None when its caller gets none."""
        if self.shares and entry.where == "waiting":
            self.shares[entry.priority].remove(entry.tenant, entry.job_id)
        elif self.shares:
            self.shares[entry.priority].in_flight[entry.tenant] -= 1
            for shares in self.shares.values():
                shares.come_back(entry.tenant)
        entry.where, entry.ended_at = "ended", now
        if reply is not None:
            self.replies.setdefault(entry.client, []).append((entry.job_id, reply))


def check_claim(model: Model, limit: ClaimBudget, claimed: Claimed) -> None:
    """What holds for every claim, whatever it yields; `model` is as it was before. Raises AssertionError."""
    assert claimed.paused == bool(model.paused)
    entries = [model.entries[claim.address.job_id] for claim in claimed.claims]
    for entry, claim in zip(entries, claimed.claims, strict=True):
        _check_as_accepted(entry, claim, claimed.now)
    if model.paused:
        assert not entries, "claimed from a paused service"
        return
    allowed = PRIORITIES[: limit.streams]
    back = [entry for entry in entries if entry.where == "returned"]
    new = [entry for entry in entries if entry.where == "waiting"]
    assert len(back) + len(new) == len(entries), "what somebody holds"
    assert {entry.priority for entry in new} <= set(allowed)
    assert {entry.priority for entry in back} <= set(PRIORITIES[: limit.returned])
    _check_suspects(model, entries, claimed, limit)
    _check_budget(entries, limit)
    _check_share(model, entries, limit)
    _check_order(model, entries, claimed, limit)
    _check_blocked(model, entries, claimed.blocked, limit)
    waiting = [e for each in allowed for e in model.able(each)]
    returned = [e for e in model.returned(PRIORITIES[: limit.returned]) if not e.suspect or model.may_run(e)]
    if limit.empty_handed and (waiting or returned):
        assert entries, "an idle worker was given nothing"


def _check_as_accepted(entry: Entry, claim: Claim, now: int) -> None:
    job = claim.job
    assert job is not None
    assert claim.attempts == entry.attempts
    assert (job.rows, job.tokens, job.client) == (entry.rows, entry.tokens, entry.client)
    assert job.missed(now) == entry.phase


def _check_suspects(model: Model, taken: Sequence[Entry], claimed: Claimed, limit: ClaimBudget) -> None:
    """Suspects of one batch, no more than the attempts left allow, in no other company, for a worker with nothing."""
    group = [entry for entry in taken if entry.suspect]
    if group:
        assert limit.empty_handed
        assert len(group) == len(taken), "a suspect in company"
        assert len({(entry.priority, entry.batch) for entry in group}) == 1, "suspects of two batches"
        assert any(map(model.may_run, group)), "the last worker was given a suspect"
        assert len(group) <= min(_group_size(entry, limit.max_attempts) for entry in group)
    left = [e for e in model.returned() if e.suspect and e not in group and model.may_run(e, taken)]
    assert claimed.suspects == min((PRIORITIES.index(entry.priority) + 1 for entry in left), default=0)


def _group_size(entry: Entry, max_attempts: int) -> int:
    left = (max_attempts - 1 - entry.attempts) / (max_attempts - 1)
    return max(1, int(entry.batch_size**left + 1e-9))


def _check_budget(taken: Sequence[Entry], limit: ClaimBudget) -> None:
    assert len(taken) <= limit.jobs
    rows, tokens = sum(entry.rows for entry in taken), sum(entry.tokens for entry in taken)
    over_large = len(taken) == 1 and limit.empty_handed
    assert not taken or over_large or (rows <= limit.rows and tokens <= limit.tokens), "beyond the budget"


def _check_share(model: Model, taken: Sequence[Entry], limit: ClaimBudget) -> None:
    if any(entry.suspect for entry in taken):
        return
    waiting = len(model.returned()) + sum(len(model.waiting(priority)) for priority in PRIORITIES)
    share = max(1, ceil((waiting + limit.held) / limit.live_workers) - limit.held)
    assert len(taken) <= share or sum(entry.rows for entry in taken[:-1]) < limit.next_rows, "hoarded"


def _check_order(model: Model, taken: Sequence[Entry], claimed: Claimed, limit: ClaimBudget) -> None:
    """Each stream in its order, innocents that were given back first; a less urgent job before a more urgent one only
    out of what its class has saved.
    """
    by_share = {claim.address.job_id for claim in claimed.claims if claim.by_share}
    saved = {Priority.REALTIME: 0, Priority.NORMAL: limit.saved[0], Priority.BATCH: limit.saved[1]}
    ready = 0
    for at, priority in enumerate(PRIORITIES):
        mine = [entry for entry in taken if entry.priority == priority]
        returned = model.returned([priority])
        waited = [entry for entry in returned if not entry.suspect] if at < limit.returned else []
        waited += model.able(priority)
        plain = [entry for entry in mine if not entry.suspect]
        assert plain == waited[: len(plain)], "overtaken within its stream"
        assert claimed.waiting[at] == len(returned) + len(model.waiting(priority)) - len(mine)
        paid = sum(entry.rows for entry in plain if entry.job_id in by_share)
        assert paid <= saved[priority]
        if any(entry.job_id not in by_share for entry in mine):
            assert not ready, "a less urgent job came first"
        left = waited if at < limit.streams else [e for e in waited if e.where == "returned"]
        ready += len([entry for entry in left if entry not in plain])


def _check_blocked(model: Model, taken: Sequence[Entry], blocked: int, limit: ClaimBudget) -> None:
    if not blocked:
        return
    assert blocked <= max(limit.streams, limit.returned)
    priority = PRIORITIES[blocked - 1]
    innocents = [entry for entry in model.returned([priority]) if not entry.suspect]
    queued = (innocents if blocked <= limit.returned else []) + model.able(priority)
    first = next(entry for entry in queued if entry not in taken)
    rows, tokens = (sum(sizes) for sizes in zip(*[(each.rows, each.tokens) for each in [*taken, first]], strict=True))
    assert rows > limit.rows or tokens > limit.tokens, "no room for what fits"
