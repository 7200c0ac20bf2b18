"""What a queue must hold after each verb, in plain Python: the model that the state machine runs beside a server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from millstream.broker.job import PRIORITIES, Claim, Priority
from millstream.broker.keys import RETURNED
from millstream.broker.streams import Claimed, Limit

MAX_JOBS = 16
MAX_BATCH_JOBS = 8
"""Limits of the service: on all jobs, and on those of the batch stream."""

CANCELLED = b"cancelled"
"""Stands for the reply that a purge writes, and for the result that the cancellation of a detached job writes."""

SUSPECT = 1.0
"""From so many attempts on a job runs alone."""


@dataclass(eq=False)
class Entry:
    """One accepted job. `phase` is the limit that had passed when it was sent; `idle`: not renewed for a lease."""

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
    unwanted: bool = False
    ended_at: float = 0.0

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

    def live(self, priority: Priority | None = None) -> list[Entry]:
        """Accepted and not settled."""
        return [e for e in self.entries.values() if e.where != "ended" and priority in (None, e.priority)]

    def waiting(self, priority: Priority) -> list[Entry]:
        return [entry for entry in self.live(priority) if entry.where == "waiting"]

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

    def strangers(self, consumer: str) -> list[Entry]:
        """What `consumer` holds without knowing."""
        return [entry for entry in self.held(consumer) if entry.job_id not in self.hands[consumer]]

    def refusal(self, priority: Priority, jobs: int) -> str:
        """Why so many new jobs are turned away; empty where they are accepted."""
        if self.paused == "refusing":
            return "paused"
        full = len(self.live()) + jobs > MAX_JOBS
        batch_full = priority == Priority.BATCH and len(self.live(priority)) + jobs > MAX_BATCH_JOBS
        return "queue_full" if full or batch_full else ""

    def hand_over(self, entry: Entry, consumer: str) -> None:
        entry.where, entry.holder, entry.idle = "held", consumer, False

    def give_back(self, entry: Entry, attempts: float) -> None:
        entry.where, entry.idle = "returned", False
        entry.attempts += attempts

    def end(self, entry: Entry, reply: bytes | None, now: float) -> None:
        """The job is over; `reply` is None when its caller gets none."""
        entry.where, entry.ended_at = "ended", now
        if reply is not None:
            self.replies.setdefault(entry.client, []).append((entry.job_id, reply))


def check_claim(model: Model, limit: Limit, claimed: Claimed) -> None:
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
    assert {entry.priority for entry in new} <= set(allowed)
    assert entries == back + new, "new jobs before those given back, or what somebody holds"
    _check_returned(model.returned(PRIORITIES[: limit.returned]), back, new, limit, claimed.suspects)
    _check_budget(back, new, limit)
    _check_share(sum(len(model.waiting(priority)) for priority in PRIORITIES), new, limit)
    _check_order(model, new, claimed, limit)
    _check_blocked(model, entries, claimed.blocked, limit)
    if limit.empty_handed and not back and any(model.waiting(priority) for priority in allowed):
        assert new, "an idle worker was given nothing of what waits"


def _check_as_accepted(entry: Entry, claim: Claim, now: int) -> None:
    job = claim.job
    assert job is not None
    assert claim.attempts == entry.attempts
    assert (job.rows, job.tokens, job.client) == (entry.rows, entry.tokens, entry.client)
    assert job.missed(now) == entry.phase


def _check_returned(
    pool: Sequence[Entry], back: Sequence[Entry], new: Sequence[Entry], limit: Limit, left_suspects: int
) -> None:
    """All that were given back come, but for suspects: one of those, alone, to a worker that holds nothing."""
    suspects = [entry for entry in back if entry.suspect]
    if suspects:
        assert limit.empty_handed
        assert (len(back), len(new)) == (1, 0), "a suspect in company"
    else:
        innocents = [entry for entry in _by_stream(pool) if not entry.suspect]
        assert back == innocents[: limit.jobs], "given back and passed over"
    assert left_suspects == sum(1 for entry in pool if entry.suspect) - len(suspects)
    assert back or not pool or not limit.empty_handed, "an idle worker was given nothing of what was given back"


def _check_budget(back: Sequence[Entry], new: Sequence[Entry], limit: Limit) -> None:
    assert len(back) + len(new) <= limit.jobs
    rows = sum(entry.rows for entry in [*back, *new])
    tokens = sum(entry.tokens for entry in [*back, *new])
    over_large = len(new) == 1 and not back and limit.empty_handed
    assert not new or over_large or (rows <= limit.rows and tokens <= limit.tokens), "beyond the budget"


def _check_share(waiting: int, new: Sequence[Entry], limit: Limit) -> None:
    assert len(new) <= max(1, ceil(waiting / limit.live_workers)), "hoarded"


def _check_order(model: Model, new: Sequence[Entry], claimed: Claimed, limit: Limit) -> None:
    """Each stream in its order; a less urgent job before a more urgent one only out of what its class has saved."""
    by_share = {claim.address.job_id for claim in claimed.claims if claim.by_share}
    saved = {Priority.REALTIME: 0, Priority.NORMAL: limit.saved[0], Priority.BATCH: limit.saved[1]}
    for at, priority in enumerate(PRIORITIES):
        mine = [entry for entry in new if entry.priority == priority]
        waited = model.waiting(priority)
        assert mine == waited[: len(mine)], "overtaken within its stream"
        assert claimed.waiting[at] == len(waited) - len(mine)
        assert sum(entry.rows for entry in mine if entry.job_id in by_share) <= saved[priority]
        if any(entry.job_id not in by_share for entry in mine):
            assert not any(claimed.waiting[:at]), "a less urgent job came first"


def _check_blocked(model: Model, taken: Sequence[Entry], blocked: int, limit: Limit) -> None:
    if not blocked:
        return
    assert blocked <= limit.streams
    first = next(entry for entry in model.waiting(PRIORITIES[blocked - 1]) if entry not in taken)
    rows, tokens = (sum(sizes) for sizes in zip(*[(each.rows, each.tokens) for each in [*taken, first]], strict=True))
    assert rows > limit.rows or tokens > limit.tokens, "no room for what fits"


def _by_stream(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: PRIORITIES.index(entry.priority))
